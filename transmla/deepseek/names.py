"""The names of a DeepSeek-V3 layer's modules and tensors, as transformers' class and every engine have them."""

from collections.abc import Mapping
from types import MappingProxyType

LAYERS = "model.layers."
ATTENTION = "self_attn"

QUERY, QUERY_DOWN, QUERY_UP = "q_proj", "q_a_proj", "q_b_proj"
KV_DOWN, KV_UP = "kv_a_proj_with_mqa", "kv_b_proj"
OUTPUT = "o_proj"
PROJECTIONS = (QUERY, QUERY_DOWN, QUERY_UP, KV_DOWN, KV_UP, OUTPUT)
#: The projections from the layer's input, which have biases where attention has any.
BIASED = (QUERY_DOWN, KV_DOWN)
#: The norm of each latent, by the projection that it follows.
LATENT_NORMS: Mapping[str, str] = MappingProxyType({KV_DOWN: "kv_a_layernorm", QUERY_DOWN: "q_a_layernorm"})
#: What a mixture of experts has here and in no source: nothing, written as zeros.
ZEROS = ("mlp.gate.e_score_correction_bias", "mlp.shared_experts.")
#: Endings of the names of what is added to the residual stream.
ADDED_TO_STREAM = ("embed_tokens.weight", "o_proj.weight", "o_proj.bias", "down_proj.weight", "experts.down_proj")


def layer_prefix(index: int) -> str:
    """Return how the names of a decoder layer's tensors begin."""
    return f"{LAYERS}{index}."
