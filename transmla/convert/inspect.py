"""What a model is and what it can become, from its config and headers alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from transmla.arch.skeleton import Skeleton
from transmla.arch.spec import AttentionSpec, describe, load_config
from transmla.arch.stored import check_depth, left_over, stored_shapes
from transmla.checkpoint.reader import check_headers
from transmla.checkpoint.source import open_source, remote_headers
from transmla.config import ConvertRequest, EngineName, InspectRequest, flag_name
from transmla.convert.choices import check_possible, target_spec
from transmla.convert.engines import ENGINES
from transmla.convert.plan import engines_for
from transmla.convert.sizes import choose_sizes
from transmla.errors import UsageError

_RATIOS = (0.5, 0.333, 0.25, 0.125)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Candidate(_Record):
    """One way to convert: the flags, the cache that results, and the engines whose rules the sizes meet."""

    flags: tuple[str, ...]
    exact: bool
    kv_lora_rank: int
    qk_rope_head_dim: int
    kv_bytes_per_token: int
    kv_bytes_in_context: int
    share: float
    engines: tuple[str, ...]


class Verdict(_Record):
    """What an engine makes of the model.

    Attributes:
        loads: ``exact``: with these flags its logits are the source's; ``approximate``: with these flags; ``no``.
        why: what is in the way of more.
    """

    engine: EngineName
    loads: Literal["exact", "approximate", "no"]
    flags: tuple[str, ...]
    why: str


class Inspection(_Record):
    """A model's sizes, what engines make of it, and its candidates."""

    model: str
    family: str
    model_type: str
    num_parameters: int
    dtype: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_type: str
    rope_theta: float
    max_position_embeddings: int
    context: int
    kv_numbers_per_token_layer: int
    kv_bytes_per_token: int
    kv_bytes_in_context: int
    left_over: tuple[str, ...]
    unread: tuple[str, ...]
    engines: tuple[Verdict, ...]
    candidates: tuple[Candidate, ...]


def inspect(request: InspectRequest) -> Inspection:
    """Describe a model without reading a weight.

    Raises:
        UnsupportedModelError: it cannot be converted; the exact reason.
        CheckpointError: it is absent, incomplete or contradicts itself.
    """
    source = open_source(
        request.model, gguf_file=request.gguf_file, revision=request.revision, token=request.token, weights=False
    )
    config = load_config(source.folder)
    spec = describe(config, max_position_embeddings=request.max_position_embeddings)
    headers = remote_headers(source, token=request.token)
    check_depth(spec, headers)
    expected = stored_shapes(Skeleton(config).shapes, spec.family, headers, tied=config.tie_word_embeddings)
    check_headers(headers, expected)
    dtype = headers[spec.family.embedding].dtype
    token_bytes = dtype.itemsize * spec.num_hidden_layers

    return Inspection(
        model=request.model,
        family=spec.family.title,
        model_type=spec.model_type,
        num_parameters=sum(shape.numel() for shape in expected.values()),
        dtype=str(dtype).removeprefix("torch."),
        num_hidden_layers=spec.num_hidden_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        rope_type=spec.rope_type,
        rope_theta=spec.rope_theta,
        max_position_embeddings=spec.max_position_embeddings,
        context=request.context,
        kv_numbers_per_token_layer=spec.cache_numbers,
        kv_bytes_per_token=spec.cache_numbers * token_bytes,
        kv_bytes_in_context=spec.cache_numbers * token_bytes * request.context,
        left_over=left_over(headers, expected, spec.family),
        unread=tuple(sorted(spec.unread)),
        engines=tuple(_verdict(spec, name) for name in ENGINES),
        candidates=tuple(_candidates(spec, token_bytes, request.context)),
    )


def _verdict(spec: AttentionSpec, name: EngineName) -> Verdict:
    """Try the exact mode, then half of the cache, then without biases."""
    ways: list[dict[str, Any]] = [{"exact": True}, {"kv_ratio": 0.5}, {"kv_ratio": 0.5, "biases": "fold"}]
    why = last = ""
    for way in ways:
        request = ConvertRequest(model="", output_dir=Path(), engine=(name,), **way)
        target = target_spec(request, spec)
        try:
            check_possible(request, target)
            choose_sizes(request, target)
        except UsageError as error:
            # The first reason is what is in the way of the best.
            last = str(error)
            why = why or last
            continue
        if spec.mixture and ENGINES[name].shared_expert:
            why += " A mixture is given a shared expert of zeros, without which it does not load."
        if spec.mixture and request.exact:
            why = "Up to the routing, which is fitted on a text; the report says how far."
        return Verdict(
            engine=name,
            loads="exact" if request.exact else "approximate",
            flags=tuple(_flags({**way, "engine": name})),
            why=why,
        )
    return Verdict(engine=name, loads="no", flags=(), why=last)


def _candidates(spec: AttentionSpec, token_bytes: int, context: int) -> Iterator[Candidate]:
    """Try the exact mode, common ratios, and the sizes that single engines insist on."""
    ways: list[dict[str, Any]] = [{"exact": True}, *({"kv_ratio": ratio} for ratio in _RATIOS)]
    # Few engines hold biases.
    fold: dict[str, Any] = {"biases": "fold"} if spec.biases else {}
    if fold:
        ways += [{"kv_ratio": ratio, **fold} for ratio in _RATIOS]
    fixed = sorted({(name, cache) for name, engine in ENGINES.items() for cache in engine.caches})
    ways += [
        {"engine": (name,), "kv_lora_rank": rank, "qk_rope_head_dim": rope, **fold} for name, (rank, rope) in fixed
    ]
    for way in ways:
        request = ConvertRequest(model="", output_dir=Path(), **way)
        target = target_spec(request, spec)
        try:
            check_possible(request, target)
            sizes = choose_sizes(request, target)
        except UsageError:
            continue
        if sizes.cache_numbers > spec.cache_numbers:
            continue
        yield Candidate(
            flags=tuple(_flags(way)),
            exact=request.exact,
            kv_lora_rank=sizes.kv_lora_rank,
            qk_rope_head_dim=sizes.qk_rope_head_dim,
            kv_bytes_per_token=sizes.cache_numbers * token_bytes,
            kv_bytes_in_context=sizes.cache_numbers * token_bytes * context,
            share=sizes.cache_numbers / spec.cache_numbers,
            engines=tuple(engines_for(sizes, target, request)),
        )


def _flags(way: dict[str, Any]) -> Iterator[str]:
    for field, value in way.items():
        if value is True:
            yield flag_name(field)
        else:
            yield f"{flag_name(field)} {value[0] if isinstance(value, tuple) else value}"
