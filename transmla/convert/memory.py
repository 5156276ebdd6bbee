"""How much memory a conversion takes, from sizes alone."""

import math
from collections.abc import Iterable, Mapping

from transmla.arch.experts import is_expert
from transmla.arch.spec import AttentionSpec
from transmla.config import ConvertRequest


def peak_memory(
    request: ConvertRequest, spec: AttentionSpec, layer: Mapping[str, Iterable[int]], *, with_text: bool
) -> int:
    """Estimate the bytes of the tensors held at once: those of one layer at work, or the embedding and its scaled copy.

    Args:
        request: the text's length, and how it is worked on.
        spec: the source.
        layer: shape of every tensor of a target's decoder layer, by name.
        with_text: whether the layers are fitted to a text.
    """
    # Read, running in float32, converted; and of a mixture one expert, likewise.
    at_work = 3 * sum(math.prod(shape) for name, shape in layer.items() if not is_expert(name))
    if spec.mixture:
        at_work += 3 * 3 * spec.mixture.intermediate_size * spec.hidden_size
    embedding = 2 * spec.vocab_size * spec.hidden_size
    # Float64 counts twice; each head has a moment of its own, and the search for the least cost copies them.
    each = spec.num_attention_heads + spec.num_key_value_heads
    moments = 2 * (2 * spec.hidden_size**2 + 3 * each * spec.cache_numbers**2)
    if not with_text:
        return 4 * max(at_work + moments, embedding)
    # Two residual streams, and what one layer is given and should put out; of both what waits for its experts.
    own = request.exact or request.method == "rorope"
    streams = (1 if own else 4) + (1 if own else 2) * (spec.mixture is not None)
    stream = streams * (request.num_windows + request.num_heldout_windows) * request.window * spec.hidden_size
    batch = request.batch_size * request.window * (3 * spec.intermediate_size + 6 * spec.hidden_size)
    scores = 4 * max(spec.num_attention_heads * request.window**2, 2**21)
    return 4 * (stream + max(at_work + moments + batch + scores, embedding))
