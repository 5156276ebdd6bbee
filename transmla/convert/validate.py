"""What may be asked of a source: flags that go together, and those that do not."""

from dataclasses import dataclass

import torch

from transmla.arch.spec import AttentionSpec
from transmla.config import ConvertRequest
from transmla.config.refusal import HALF, TEXT, Change, Refusal
from transmla.convert.methods import find_method
from transmla.convert.methods.base import Method
from transmla.convert.methods.fitted import Fitted
from transmla.convert.sizes import choose_sizes, freq_folds
from transmla.deepseek.engines import ENGINES, engines_for
from transmla.deepseek.sizes import MLASizes
from transmla.deepseek.target_spec import TargetSpec
from transmla.errors import CheckpointError, UsageError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The method that learns on converted inputs, and takes any RoPE.
_FITTED_METHOD: Change = {"method": Fitted.name}
# What belongs to a fit, and has no place beside --exact.
_OF_A_FIT = ("q_lora_rank", "freq_fold", "heal_steps", "latent_norm", "biases")


@dataclass(frozen=True)
class Choices:
    """A request with nothing left open, and known to be possible.

    Attributes:
        spec: the source's description with what the target keeps of it.
        method: with its options.
        folds: how many neighboring frequencies may share slots; the best is chosen per layer.
        dtype: of the written weights.
    """

    spec: TargetSpec
    method: Method
    sizes: MLASizes
    folds: tuple[int, ...]
    dtype: torch.dtype


def choose(request: ConvertRequest, spec: AttentionSpec, *, stored: torch.dtype) -> Choices:
    """Settle everything that no weight decides.

    Args:
        request: what is wanted.
        spec: of the source.
        stored: type of the source's weights.

    Raises:
        Refusal: why it is not possible, and what might be.
        CheckpointError: a source of a type that cannot be converted.
    """
    target = target_spec(request, spec)
    method = find_method(request)
    check_possible(request, target)
    sizes = choose_sizes(request, target)
    check_method(request, target, sizes, method)
    _check_loadable(request, target, sizes)
    folds, dtype = choose_folds(request, target, sizes, method), storage_dtype(request, stored, sizes)
    return Choices(spec=target, method=method, sizes=sizes, folds=folds, dtype=dtype)


def target_spec(request: ConvertRequest, spec: AttentionSpec) -> TargetSpec:
    """Return the source's description with what the target keeps of it.

    Scaled frequencies are kept where all engines that are asked for compute them; a checkpoint for any engine is plain.
    """
    kept = bool(request.engine) and all(spec.rope_type in ENGINES[name].scaled_ropes for name in request.engine)
    return TargetSpec.of(spec, keep_biases=request.biases == "keep", keep_scaling=kept and not request.exact)


def check_possible(request: ConvertRequest, spec: TargetSpec) -> None:
    """Refuse what no text and no sizes make possible for this source.

    Raises:
        Refusal: why not, and what to do instead.
    """
    if request.exact and spec.family.head_norms:
        raise Refusal(
            f"--exact is impossible for {spec.family.title}, because MLA has no norm on queries and keys",
            {**HALF, "exact": False},
        )
    if "o_proj" in spec.biases and not spec.keep_biases:
        raise Refusal("--biases merge has no place for a bias on the output of attention", {"biases": "keep"})


def check_method(request: ConvertRequest, spec: TargetSpec, sizes: MLASizes, method: Method) -> None:
    """Refuse flags that contradict each other or the source.

    Raises:
        Refusal: which, and what would do.
    """
    if not method.needs_moments:
        default = ConvertRequest.model_fields
        useless = [name for name in _OF_A_FIT if getattr(request, name) != default[name].default]
        if not spec.mixture and request.calibration not in ((), ("none",)):
            useless.append("calibration")
        if not spec.mixture and request.repeats:
            useless.append("repeats")
        if useless:
            raise Refusal(f"--{method.name} fits nothing", dict.fromkeys(useless))
        _check_routing(request, spec)
        return
    if not request.calibration:
        raise Refusal(
            "The calibration text is missing; without any, a conversion loses far more quality",
            TEXT,
            {"calibration": ("none",)},
        )
    _check_routing(request, spec)
    if spec.nonlinear and "none" in request.calibration:
        what = "The norm on queries and keys" if spec.family.head_norms else "--biases merge"
        raise Refusal(f"{what} needs a text, to find the nearest linear maps on", TEXT)
    if "none" in request.calibration and len(request.calibration) > 1:
        texts = tuple(text for text in request.calibration if text != "none")
        raise Refusal(
            "--calibration none means no text at all", *({"calibration": kept} for kept in (texts, ("none",)) if kept)
        )
    if "none" in request.calibration and request.repeats:
        raise Refusal("--repeats adds windows to those of a text", TEXT, {"repeats": None})
    _check_learning(request, sizes, method)
    if method.rope_types is not None and spec.rope_type not in method.rope_types:
        raise Refusal(
            f"--method {method.name} needs {' or '.join(sorted(map(_rope_name, method.rope_types)))}, found type "
            f"{spec.rope_type!r}; --method fitted fits other frequencies onto the target's plain grid",
            _FITTED_METHOD,
        )
    if request.freq_fold is not None and not method.takes_freq_fold:
        raise UsageError(f"--freq-fold says nothing to --method {method.name}, which shares no slots: drop it.")


def _rope_name(kind: str) -> str:
    return "plain RoPE" if kind == "default" else f"RoPE of type {kind}"


def _check_learning(request: ConvertRequest, sizes: MLASizes, method: Method) -> None:
    fits_norm = request.latent_norm == "fitted"
    needed: dict[str, object] = {} if method.learns_on_converted else {**_FITTED_METHOD}
    needed |= TEXT if "none" in request.calibration else {}
    for flag, asked in (("--heal-steps", request.heal_steps), ("--latent-norm fitted", fits_norm)):
        if asked and needed:
            raise Refusal(f"{flag} needs --method fitted and a text to learn from", needed)
    if fits_norm and request.profile != "portable":
        raise Refusal(
            "--latent-norm fitted survives 8-bit blocks by itself, with --profile portable", {"profile": "portable"}
        )
    if fits_norm and sizes.kv_lora_rank < 2:
        raise Refusal("--latent-norm fitted takes one latent number, and there is only one", {"kv_lora_rank": 2})


def _check_routing(request: ConvertRequest, spec: TargetSpec) -> None:
    if spec.mixture and request.calibration in ((), ("none",)):
        raise Refusal("The routing of the experts needs a text, to find what all tokens have in common", TEXT)


def _check_loadable(request: ConvertRequest, spec: TargetSpec, sizes: MLASizes) -> None:
    """Refuse what no engine loads, whatever its sizes are.

    Raises:
        Refusal: why none does.
    """
    if engines_for(sizes, spec, request):
        return
    engines = {name: engine for name, engine in ENGINES.items() if request.profile in engine.profiles}
    portable: Change = {"profile": "portable"}
    if request.exact:
        why = "gives every rotary slot a frequency of its own, as --exact must"
    elif spec.biased:
        why = "has a place for the model's biases"
    else:
        why = "loads a mixture without a shared expert, which --engine adds"
    raise Refusal(
        f"No engine of --profile {request.profile} ({', '.join(engines)}) {why}",
        *({"engine": (name,)} for name, engine in engines.items() if not engine.caches and not request.exact),
        {"biases": "merge"},
        portable,
    )


def choose_folds(request: ConvertRequest, spec: TargetSpec, sizes: MLASizes, method: Method) -> tuple[int, ...]:
    """Return how many neighboring frequencies may share slots.

    Raises:
        Refusal: a fold that does not share them out evenly; those that do.
    """
    if not method.takes_freq_fold:
        return ()
    folds = freq_folds(spec, sizes.qk_rope_head_dim)
    if request.freq_fold is None:
        return method.choose_folds(folds)
    if request.freq_fold not in folds:
        raise Refusal(
            f"--freq-fold {request.freq_fold} does not share {sizes.qk_rope_head_dim // 2} slots out evenly among "
            f"{spec.num_pairs} frequencies",
            *({"freq_fold": fold} for fold in folds),
        )
    return (request.freq_fold,)


def storage_dtype(request: ConvertRequest, stored: torch.dtype, sizes: MLASizes) -> torch.dtype:
    """Return the type of the written weights.

    Raises:
        CheckpointError: a source of a type that cannot be converted.
        Refusal: a type that cannot hold the result; what can.
    """
    dtype = stored if request.dtype == "auto" else _DTYPES[request.dtype]
    if dtype == torch.float64:
        dtype = torch.float32  # No model is computed in more.
    if dtype not in _DTYPES.values():
        raise CheckpointError(f"The weights are stored as {dtype}: convert a float32, bfloat16 or float16 one.")
    tiny = request.latent_norm == "neutral" or sizes.q_lora_rank is not None
    if dtype == torch.float16 and request.profile == "portable" and tiny:
        raise Refusal(
            "The portable profile writes latent rows of about 1e-6, which float16 cannot hold",
            {"dtype": "bfloat16"},
            {"dtype": "float32"},
            {"profile": "quantizable"},
            {"latent_norm": "fitted", **({} if request.q_lora_rank is None else {"q_lora_rank": None})},
        )
    return dtype
