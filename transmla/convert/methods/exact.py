"""The same attention as MLA, at equal cache: every key pair in a slot of its own, every value latent.

See docs/concepts/algorithm.md, "Exact conversion".
"""

import torch

from transmla.arch.spec import AttentionSpec
from transmla.calibration.moments import AttentionWeights, Moments
from transmla.convert.latent_attention import LatentAttention
from transmla.convert.methods.base import ConvertedLayer, LayerGoal, Method
from transmla.convert.methods.steps import rotary_queries
from transmla.deepseek.sizes import MLASizes
from transmla.linalg.mixing import identity_split
from transmla.linalg.rotary import interleave, to_pairs


class Exact(Method):
    """No approximation at all; ``--exact`` is its other spelling."""

    name = "exact"
    title = "exact"
    exact = True
    needs_moments = False
    own_frequencies = True

    def fixed_sizes(self, spec: AttentionSpec) -> MLASizes:
        """Return the sizes at which GQA is MLA: all keys rotary, all values latent."""
        return MLASizes(
            kv_lora_rank=spec.key_size, qk_rope_head_dim=spec.key_size, qk_nope_head_dim=0, v_head_dim=spec.head_dim
        )

    def convert(self, weights: AttentionWeights, moments: Moments | None, goal: LayerGoal) -> ConvertedLayer:
        """Write the same attention in the target's factors."""
        kv_heads, head_dim, _ = weights.key.shape
        heads = len(weights.query)
        key = to_pairs(weights.key)
        split = identity_split(kv_heads, head_dim // 2, like=key)
        select = torch.eye(kv_heads * head_dim).to(weights.value).unflatten(0, (kv_heads, head_dim))
        attention = LatentAttention(
            query_nope=weights.query[:, :0],
            query_rope=rotary_queries(to_pairs(weights.query), split),
            latent=weights.value.flatten(0, 1),
            key_rope=interleave(key.flatten(0, 1)),
            key_up=weights.query.new_zeros(heads, 0, kv_heads * head_dim),
            value_up=select.repeat_interleave(heads // kv_heads, dim=0),
            output=weights.output,
            output_bias=weights.output_bias,
            softmax_scale=head_dim**-0.5,
        )
        return ConvertedLayer(attention)
