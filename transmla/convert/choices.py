"""What may be asked of a source: flags that go together, and those that do not."""

from dataclasses import replace

import torch

from transmla.arch.spec import AttentionSpec
from transmla.checkpoint.reader import CheckpointReader
from transmla.config import ConvertRequest
from transmla.convert.engines import ENGINES
from transmla.convert.sizes import MLASizes, freq_folds
from transmla.errors import CheckpointError, UsageError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def target_spec(request: ConvertRequest, spec: AttentionSpec) -> AttentionSpec:
    """Return the source's description with what the target keeps of it.

    Scaled frequencies are kept where all engines that are asked for compute them; a checkpoint for any engine is plain.
    """
    kept = bool(request.engine) and all(spec.rope_type in ENGINES[name].scaled_ropes for name in request.engine)
    return replace(spec, keep_biases=request.biases == "keep", keep_scaling=kept and not request.exact)


def check_possible(request: ConvertRequest, spec: AttentionSpec) -> None:
    """Refuse what no text and no sizes make possible for this source.

    Raises:
        UsageError: why not, and what to do instead.
    """
    if request.exact and spec.family.head_norms:
        raise UsageError(
            f"--exact is impossible for {spec.family.title}, because MLA has no norm on queries and keys: pass sizes "
            "and a text instead."
        )
    if "o_proj" in spec.biases and not spec.keep_biases:
        raise UsageError("--biases fold has no place for a bias on the output of attention: use --biases keep.")


def check_method(request: ConvertRequest, spec: AttentionSpec, sizes: MLASizes, method: str) -> None:
    """Refuse flags that contradict each other or the source.

    Raises:
        UsageError: which, and what would do.
    """
    check_possible(request, spec)
    if method == "exact":
        fitted = ("q_lora_rank", "freq_fold", "heal_steps", "latent_norm", "biases")
        for flag in fitted if spec.mixture else (*fitted, "calibration"):
            if getattr(request, flag) not in (ConvertRequest.model_fields[flag].default, ("none",)):
                raise UsageError(f"--exact fits nothing: drop --{flag.replace('_', '-')}.")
        _check_routing(request, spec)
        return
    if not request.calibration:
        raise UsageError(
            "The calibration text is missing: pass --calibration FILE or a hub data set, or --calibration none to "
            "convert from the weights alone, which loses far more quality."
        )
    _check_routing(request, spec)
    if spec.nonlinear and "none" in request.calibration:
        what = "The norm on queries and keys" if spec.family.head_norms else "--biases fold"
        raise UsageError(f"{what} needs a text, to find the nearest linear maps on: pass --calibration FILE.")
    if "none" in request.calibration and len(request.calibration) > 1:
        raise UsageError("--calibration none means no text at all: drop it, or the texts beside it.")
    live = request.latent_norm == "live"
    for flag, asked in (("--heal-steps", request.heal_steps), ("--latent-norm live", live)):
        if asked and (method != "complex" or "none" in request.calibration):
            raise UsageError(f"{flag} needs --method complex and a text to learn from: pass --calibration FILE.")
    if live:
        if request.profile != "portable":
            raise UsageError("--latent-norm live survives 8-bit blocks by itself: drop --profile quantizable.")
        if sizes.kv_lora_rank < 2:
            raise UsageError("--latent-norm live takes one latent number: pass --kv-lora-rank 2 or more, found 1.")
    if method == "rorope" and spec.rope_type != "default":
        raise UsageError(
            f"--method rorope needs plain RoPE, found type {spec.rope_type!r}: --method complex fits other frequencies "
            "onto the target's plain grid."
        )


def _check_routing(request: ConvertRequest, spec: AttentionSpec) -> None:
    if spec.mixture and request.calibration in ((), ("none",)):
        raise UsageError(
            "The routing of the experts needs a text, to find what all tokens have in common: pass --calibration FILE."
        )


def choose_folds(request: ConvertRequest, spec: AttentionSpec, sizes: MLASizes) -> tuple[int, ...]:
    """Return how many neighbouring frequencies may share slots.

    Raises:
        UsageError: a fold that does not share them out evenly; those that do.
    """
    if request.exact:
        return ()
    folds = freq_folds(spec, sizes.qk_rope_head_dim)
    if request.freq_fold is None:
        # The published method has no rule but trying on the test text; four is what its authors use most.
        return tuple(folds) if request.method == "complex" else (min(folds, key=lambda fold: abs(fold - 4)),)
    if request.freq_fold not in folds:
        raise UsageError(
            f"--freq-fold {request.freq_fold} does not share {sizes.qk_rope_head_dim // 2} slots out evenly among "
            f"{spec.num_pairs} frequencies; these do: {', '.join(map(str, folds))}."
        )
    return (request.freq_fold,)


def storage_dtype(
    request: ConvertRequest, reader: CheckpointReader, spec: AttentionSpec, sizes: MLASizes
) -> torch.dtype:
    """Return the type of the written weights.

    Raises:
        CheckpointError: a source of a type that cannot be converted.
        UsageError: a type that cannot hold the result; what can.
    """
    dtype = reader.headers[spec.family.embedding].dtype if request.dtype == "auto" else _DTYPES[request.dtype]
    if dtype == torch.float64:
        dtype = torch.float32  # No model is computed in more.
    if dtype not in _DTYPES.values():
        raise CheckpointError(f"The weights are stored as {dtype}: convert a float32, bfloat16 or float16 one.")
    tiny = request.latent_norm == "neutral" or sizes.q_lora_rank is not None
    if dtype == torch.float16 and request.profile == "portable" and tiny:
        raise UsageError(
            "The portable profile writes latent rows of about 1e-6, which float16 cannot hold: "
            "pass --dtype bfloat16 or float32, --profile quantizable, or --latent-norm live without --q-lora-rank."
        )
    return dtype
