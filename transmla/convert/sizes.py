"""From what the user asks to the sizes of the latent attention, or the nearest that work."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from transmla.arch.spec import AttentionSpec
from transmla.config import ConvertRequest, EngineName, Profile
from transmla.convert.engines import ENGINES, Engine
from transmla.errors import UsageError


@dataclass(frozen=True)
class MLASizes:
    """Sizes of the latent attention, in DeepSeek's names, and how many experts of zeros all tokens share."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 0

    @property
    def cache_numbers(self) -> int:
        """Numbers cached per token and layer: latent and rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Size of one query head; the engine scales logits by its inverse square root."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def choose_sizes(request: ConvertRequest, spec: AttentionSpec) -> MLASizes:
    """Settle every size before any weight is read.

    Raises:
        UsageError: sizes given twice, not at all, out of range, or refused by a named engine; the nearest that work.
    """
    explicit = request.kv_lora_rank is not None or request.qk_rope_head_dim is not None
    given = [flag for flag, used in _ways(request, explicit) if used]
    if len(given) > 1:
        raise UsageError(f"The sizes are given in more than one way ({' and '.join(given)}): keep one.")
    if not given:
        raise UsageError(
            "The sizes are missing: give --kv-lora-rank with --qk-rope-head-dim, or --kv-ratio, or --exact."
        )
    if request.exact:
        sizes = exact_sizes(spec)
    elif request.kv_ratio is not None:
        sizes = _sizes_for_ratio(request.kv_ratio, spec, request.engine)
    elif request.kv_lora_rank is None or request.qk_rope_head_dim is None:
        raise UsageError("--kv-lora-rank and --qk-rope-head-dim belong together: give both, or --kv-ratio instead.")
    else:
        sizes = _plain(request.kv_lora_rank, request.qk_rope_head_dim, spec)
    if request.q_lora_rank is not None and request.q_lora_rank > spec.hidden_size:
        raise UsageError(f"--q-lora-rank {request.q_lora_rank} is out of range: the hidden size is {spec.hidden_size}.")
    # Only a query projection that all heads share can have biases; as large as all heads together it loses nothing.
    whole = spec.num_attention_heads * spec.head_dim if spec.biased else None
    sizes = replace(sizes, q_lora_rank=whole if request.q_lora_rank is None else request.q_lora_rank)
    if not request.exact:
        _check_range(sizes, spec, padded=any(ENGINES[name].caches for name in request.engine))
    for name in request.engine:
        sizes = fit_engine(sizes, spec, name, profile=request.profile, exact=request.exact)
    return sizes


def candidate_splits(request: ConvertRequest, spec: AttentionSpec) -> tuple[MLASizes, ...]:
    """Return the ways to share a budget (``--kv-ratio``) out between latent and rotary key, the plain rule's first.

    Where the sizes are given, or an engine dictates them, there is one way only.
    """
    chosen = choose_sizes(request, spec)
    if request.kv_ratio is None or any(ENGINES[name].caches for name in request.engine):
        return (chosen,)
    total = chosen.cache_numbers
    # Beyond these no split has ever been close to the best.
    ropes = [rope for rope in _powers_of_two(spec, total / 2) if rope >= total / 16]
    others = [
        rope
        for rope in ropes
        if rope != chosen.qk_rope_head_dim and request.freq_fold in (None, *freq_folds(spec, rope))
    ]
    return chosen, *(replace(chosen, kv_lora_rank=total - rope, qk_rope_head_dim=rope) for rope in others)


def exact_sizes(spec: AttentionSpec) -> MLASizes:
    """Return the sizes at which GQA is MLA: all keys rotary, all values latent (ALGORITHM.md §5)."""
    return MLASizes(
        kv_lora_rank=spec.key_size, qk_rope_head_dim=spec.key_size, qk_nope_head_dim=0, v_head_dim=spec.head_dim
    )


def rope_sizes(spec: AttentionSpec) -> list[int]:
    """Return the rotary sizes that the source's keys can fill."""
    return list(range(2, spec.key_size + 1, 2))


def freq_folds(spec: AttentionSpec, qk_rope_head_dim: int) -> list[int]:
    """Return the numbers of neighbouring frequencies that can share ``qk_rope_head_dim/2`` slots evenly.

    A fold f cuts the pairs into groups of f; each group gets the same whole number of slots. One group of all pairs
    takes any number of them.
    """
    slots, pairs = qk_rope_head_dim // 2, spec.num_pairs
    return [fold for fold in range(1, pairs + 1) if pairs % fold == 0 and slots * fold % pairs == 0]


def fit_engine(sizes: MLASizes, spec: AttentionSpec, name: EngineName, *, profile: Profile, exact: bool) -> MLASizes:
    """Pad what an engine lets be padded.

    Raises:
        UsageError: the engine cannot load the result; why, and the nearest sizes it can.
    """
    engine = ENGINES[name]
    if profile not in engine.profiles:
        raise UsageError(f"{engine.title} needs --profile {engine.profiles[0]}, found {profile}.")
    if exact and not engine.free_grid:
        raise UsageError(
            f"{engine.title} cannot give every rotary slot a frequency of its own, as --exact must: use transformers, "
            "or --kv-ratio."
        )
    if spec.biased and not engine.biases:
        raise UsageError(
            f"{engine.title} has no place for the biases of {', '.join(sorted(spec.biases))}: "
            + ("--exact needs one that has." if exact else "pass --biases fold.")
        )
    if engine.max_layers is not None and spec.num_hidden_layers > engine.max_layers:
        raise UsageError(
            f"{engine.title} misreads a model of more than {engine.max_layers} layers; "
            f"this one has {spec.num_hidden_layers}."
        )
    if engine.caches and (sizes.kv_lora_rank, sizes.qk_rope_head_dim) not in engine.caches:
        nearest = sorted(engine.caches, key=lambda pair: abs(sum(pair) - sizes.cache_numbers))[:2]
        raise UsageError(
            f"{engine.title} does not take {sizes.kv_lora_rank} + {sizes.qk_rope_head_dim}; nearest: "
            + " or ".join(f"--kv-lora-rank {rank} --qk-rope-head-dim {rope}" for rank, rope in nearest)
            + "."
        )
    if spec.mixture and engine.shared_expert:
        sizes = replace(sizes, n_shared_experts=1)
    return _pad_heads(sizes, engine)


def _pad_heads(sizes: MLASizes, engine: Engine) -> MLASizes:
    if not engine.heads:
        return sizes
    for nope, rope, value in engine.heads:
        if rope == sizes.qk_rope_head_dim and nope >= sizes.qk_nope_head_dim and value >= sizes.v_head_dim:
            return replace(sizes, qk_nope_head_dim=nope, v_head_dim=value)
    raise UsageError(
        f"{engine.title} has no kernel for heads of {sizes.qk_nope_head_dim} + {sizes.qk_rope_head_dim} and values of "
        f"{sizes.v_head_dim}; it takes at most {' / '.join(map(str, engine.heads[-1]))} (nope / rope / value)."
    )


def _ways(request: ConvertRequest, explicit: bool) -> Iterable[tuple[str, bool]]:
    yield "--kv-lora-rank/--qk-rope-head-dim", explicit
    yield "--kv-ratio", request.kv_ratio is not None
    yield "--exact", request.exact


def _plain(kv_lora_rank: int, qk_rope_head_dim: int, spec: AttentionSpec) -> MLASizes:
    return MLASizes(kv_lora_rank, qk_rope_head_dim, spec.head_dim, spec.head_dim)


def _sizes_for_ratio(ratio: float, spec: AttentionSpec, engines: tuple[EngineName, ...]) -> MLASizes:
    """Split a cache budget without data: a quarter for the rotary key, rounded down to a power of two."""
    budget = ratio * spec.cache_numbers
    accepted = [ENGINES[name].caches for name in engines if ENGINES[name].caches]
    if accepted:
        common = set(accepted[0]).intersection(*accepted[1:])
        if not common:
            raise UsageError(f"No one size suits all of {', '.join(engines)}: convert once for each.")
        rank, rope = min(common, key=lambda pair: (abs(sum(pair) - budget), pair))
        if rank + rope > spec.cache_numbers:
            raise UsageError(
                f"The smallest cache for {' and '.join(engines)} is {rank} + {rope}, more than the source's "
                f"{spec.cache_numbers} numbers per token and layer: if that is what you want, give --kv-lora-rank and "
                "--qk-rope-head-dim."
            )
        return _plain(rank, rope, spec)
    total = 2 * round(budget / 2)
    ropes = _powers_of_two(spec, total / 4)
    if not ropes:
        raise UsageError(
            f"--kv-ratio {ratio:g} leaves {total} of {spec.cache_numbers} numbers per token, too few for a rotary key "
            f"and a latent: use at least {8 / spec.cache_numbers:.3g}."
        )
    return _plain(total - ropes[-1], ropes[-1], spec)


def _powers_of_two(spec: AttentionSpec, largest: float) -> list[int]:
    """Return the rotary sizes up to ``largest`` that can be shared out among the frequencies."""
    return [size for size in rope_sizes(spec) if size <= largest and size & (size - 1) == 0]


def _check_range(sizes: MLASizes, spec: AttentionSpec, *, padded: bool) -> None:
    """Refuse what cannot help; an engine's fixed size may exceed what the source fills, the rest is zeros."""
    ropes = rope_sizes(spec)
    if sizes.qk_rope_head_dim not in ropes and not (padded and sizes.qk_rope_head_dim > ropes[-1]):
        near = sorted(ropes, key=lambda size: abs(size - sizes.qk_rope_head_dim))[:2]
        raise UsageError(
            f"--qk-rope-head-dim {sizes.qk_rope_head_dim} does not fit {spec.num_key_value_heads} heads of "
            f"{spec.head_dim}; nearest: {' or '.join(map(str, sorted(near)))}."
        )
    if sizes.cache_numbers > spec.cache_numbers and not padded:
        raise UsageError(
            f"{sizes.kv_lora_rank} + {sizes.qk_rope_head_dim} is out of range: the source caches only "
            f"{spec.cache_numbers} numbers per token and layer. Ask for less, or for --exact."
        )
