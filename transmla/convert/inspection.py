"""What a model is and what it can become, from its config and headers alone."""

from transmla.arch.context import longest_context
from transmla.config import InspectRequest
from transmla.convert.candidates import Candidate, Candidates, Verdict
from transmla.convert.opened import open_model
from transmla.deepseek.engines import ENGINES
from transmla.records import Record


class Inspection(Record):
    """A model's sizes, what engines make of it, and its candidates.

    Attributes:
        longest_context: what ``--max-position-embeddings`` may be at most, in tokens.
        context: the context whose KV cache is computed, in tokens.
    """

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
    longest_context: int
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
    opened = open_model(request)
    spec = opened.spec
    dtype = opened.headers[spec.family.embedding].dtype
    token_bytes = dtype.itemsize * spec.num_hidden_layers
    ways = Candidates(request, spec, dtype)

    return Inspection(
        model=request.model,
        family=spec.family.title,
        model_type=spec.model_type,
        num_parameters=sum(shape.numel() for shape in opened.shapes.values()),
        dtype=str(dtype).removeprefix("torch."),
        num_hidden_layers=spec.num_hidden_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        rope_type=spec.rope_type,
        rope_theta=spec.rope_theta,
        max_position_embeddings=spec.max_position_embeddings,
        longest_context=longest_context(opened.config),
        context=request.context,
        kv_numbers_per_token_layer=spec.cache_numbers,
        kv_bytes_per_token=spec.cache_numbers * token_bytes,
        kv_bytes_in_context=spec.cache_numbers * token_bytes * request.context,
        left_over=opened.left_over,
        unread=tuple(sorted(spec.unread)),
        engines=tuple(map(ways.verdict, ENGINES)),
        candidates=tuple(ways.candidates()),
    )
