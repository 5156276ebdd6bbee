"""From what the user asks to the sizes of the latent attention, or the nearest that work."""

from collections.abc import Mapping
from dataclasses import replace

from transmla.config import ConvertRequest, EngineName
from transmla.config.refusal import HALF, Change, Refusal
from transmla.convert.methods import find_method
from transmla.deepseek.engines import ENGINES, dictating, fit_engine
from transmla.deepseek.sizes import MLASizes
from transmla.deepseek.target_spec import TargetSpec

#: Windows on which splits of a budget are compared: enough to rank them, for they differ far more than windows do.
PREDICTION_WINDOWS = 16
#: No size at all, of any kind.
NO_SIZES: Change = {"kv_lora_rank": None, "qk_rope_head_dim": None, "kv_ratio": None, "exact": False}


def choose_sizes(request: ConvertRequest, spec: TargetSpec) -> MLASizes:
    """Settle every size before any weight is read.

    Raises:
        Refusal: sizes given twice, not at all, out of range, or refused by a named engine; what works.
    """
    given = _ways(request)
    if len(given) > 1:
        raise Refusal(
            f"The sizes are given in more than one way ({' and '.join(given)})",
            *({field: NO_SIZES[field] for way in given if way != kept for field in given[way]} for kept in given),
        )
    if not given:
        raise Refusal("The sizes are missing", HALF, {"exact": True})
    if (fixed := find_method(request).fixed_sizes(spec)) is not None:
        sizes = fixed
    elif request.kv_ratio is not None:
        sizes = _sizes_for_ratio(request.kv_ratio, spec, request.engine)
    elif request.kv_lora_rank is None or request.qk_rope_head_dim is None:
        raise Refusal(
            "--kv-lora-rank and --qk-rope-head-dim belong together",
            *_other_size(request, spec),
            _instead(request, HALF),
        )
    else:
        sizes = _plain(request.kv_lora_rank, request.qk_rope_head_dim, spec)
    if request.q_lora_rank is not None and request.q_lora_rank > spec.hidden_size:
        raise Refusal(
            f"--q-lora-rank {request.q_lora_rank} is out of range (the hidden size is {spec.hidden_size})",
            {"q_lora_rank": spec.hidden_size},
        )
    # Only a query projection that all heads share can have biases; as large as all heads together it loses nothing.
    whole = spec.num_attention_heads * spec.head_dim if spec.biased else None
    sizes = replace(sizes, q_lora_rank=whole if request.q_lora_rank is None else request.q_lora_rank)
    if fixed is None:
        _check_range(request, sizes, spec)
    for name in request.engine:
        sizes = fit_engine(sizes, spec, name, profile=request.profile, exact=request.exact)
    return sizes


def candidate_splits(request: ConvertRequest, spec: TargetSpec) -> tuple[MLASizes, ...]:
    """Return the ways to share a budget (``--kv-ratio``) out between latent and rotary key, the plain rule's first.

    Where the sizes are given, or an engine dictates them, there is one way only.
    """
    chosen = choose_sizes(request, spec)
    if request.kv_ratio is None or dictating(request.engine):
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


def rope_sizes(spec: TargetSpec) -> list[int]:
    """Return the rotary sizes that the source's keys can fill."""
    return list(range(2, spec.key_size + 1, 2))


def freq_folds(spec: TargetSpec, qk_rope_head_dim: int) -> list[int]:
    """Return the numbers of neighboring frequencies that can share ``qk_rope_head_dim/2`` slots evenly.

    A fold f cuts the pairs into groups of f; each group gets the same whole number of slots. One group of all pairs
    takes any number of them.
    """
    slots, pairs = qk_rope_head_dim // 2, spec.num_pairs
    return [fold for fold in range(1, pairs + 1) if pairs % fold == 0 and slots * fold % pairs == 0]


def _ways(request: ConvertRequest) -> Mapping[str, tuple[str, ...]]:
    """Return the ways in which the sizes are given, and the fields that give them."""
    explicit = tuple(name for name in ("kv_lora_rank", "qk_rope_head_dim") if getattr(request, name) is not None)
    ratio = () if request.kv_ratio is None else ("kv_ratio",)
    ways = {
        "--kv-lora-rank/--qk-rope-head-dim": explicit,
        "--kv-ratio": ratio,
        "--exact": ("exact",) if request.exact else (),
    }
    return {way: fields for way, fields in ways.items() if fields}


def _instead(request: ConvertRequest, change: Change) -> Change:
    """Return ``change`` with all sizes dropped that the request gives otherwise."""
    return {**change, **{field: NO_SIZES[field] for fields in _ways(request).values() for field in fields}, **change}


def _other_size(request: ConvertRequest, spec: TargetSpec) -> list[Change]:
    """Propose the one of the two sizes that is missing."""
    caches = [cache for name in request.engine for cache in ENGINES[name].caches]
    if request.kv_lora_rank is not None:
        ropes = [rope for rank, rope in caches if rank == request.kv_lora_rank]
        ropes = ropes or _powers_of_two(spec, max(2, request.kv_lora_rank / 3))
        return [{"qk_rope_head_dim": ropes[-1]}] if ropes else []
    assert request.qk_rope_head_dim is not None
    ranks = [rank for rank, rope in caches if rope == request.qk_rope_head_dim]
    rank = min(3 * request.qk_rope_head_dim, spec.cache_numbers - request.qk_rope_head_dim)
    return [{"kv_lora_rank": ranks[0] if ranks else rank}] if ranks or rank > 0 else []


def _plain(kv_lora_rank: int, qk_rope_head_dim: int, spec: TargetSpec) -> MLASizes:
    return MLASizes(kv_lora_rank, qk_rope_head_dim, spec.head_dim, spec.head_dim)


def _sizes_for_ratio(ratio: float, spec: TargetSpec, engines: tuple[EngineName, ...]) -> MLASizes:
    """Split a cache budget without data: a quarter for the rotary key, rounded down to a power of two."""
    budget = ratio * spec.cache_numbers
    if dictating(engines):
        common = set.intersection(*(set(ENGINES[name].caches) for name in dictating(engines)))
        if not common:
            raise Refusal(
                f"No one size suits all of {', '.join(engines)}", *({"engine": (name,)} for name in dictating(engines))
            )
        rank, rope = min(common, key=lambda pair: (abs(sum(pair) - budget), pair))
        if rank + rope > spec.cache_numbers:
            raise Refusal(
                f"The smallest cache for {' and '.join(engines)} is {rank} + {rope}, more than the source's "
                f"{spec.cache_numbers} numbers per token and layer",
                {"kv_lora_rank": rank, "qk_rope_head_dim": rope, "kv_ratio": None},
            )
        return _plain(rank, rope, spec)
    total = 2 * round(budget / 2)
    ropes = _powers_of_two(spec, total / 4)
    if not ropes:
        least = float(f"{8 / spec.cache_numbers:.3g}")
        raise Refusal(
            f"--kv-ratio {ratio:g} leaves {total} of {spec.cache_numbers} numbers per token, too few for a rotary key "
            "and a latent",
            *([{"kv_ratio": least}] if least <= 1 else []),
        )
    return _plain(total - ropes[-1], ropes[-1], spec)


def _powers_of_two(spec: TargetSpec, largest: float) -> list[int]:
    """Return the rotary sizes up to ``largest`` that can be shared out among the frequencies."""
    return [size for size in rope_sizes(spec) if size <= largest and size & (size - 1) == 0]


def _check_range(request: ConvertRequest, sizes: MLASizes, spec: TargetSpec) -> None:
    """Refuse what cannot help; an engine's fixed size may exceed what the source fills, the rest is zeros."""
    ropes, padded = rope_sizes(spec), bool(dictating(request.engine))
    if sizes.qk_rope_head_dim not in ropes and not (padded and sizes.qk_rope_head_dim > ropes[-1]):
        near = sorted(ropes, key=lambda size: abs(size - sizes.qk_rope_head_dim))[:2]
        raise Refusal(
            f"--qk-rope-head-dim {sizes.qk_rope_head_dim} does not fit {spec.num_key_value_heads} heads of "
            f"{spec.head_dim}",
            *({"qk_rope_head_dim": size} for size in sorted(near)),
        )
    if sizes.cache_numbers > spec.cache_numbers and not padded:
        raise Refusal(
            f"{sizes.kv_lora_rank} + {sizes.qk_rope_head_dim} is out of range (the source caches only "
            f"{spec.cache_numbers} numbers per token and layer)",
            *(_instead(request, change) for change in (HALF, {"exact": True})),
        )
