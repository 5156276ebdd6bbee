"""What a conversion holds in memory, in bytes, from sizes alone.

:mod:`transmla.convert.memory_estimate` adds it up by stages.

Numbers are multiplied by their bytes, 4 in float32 and 8 in float64; what has a single axis is left out.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from transmla.arch.experts import is_expert
from transmla.calibration.windows import WindowCounts
from transmla.config import ConvertRequest
from transmla.convert.methods.base import Method
from transmla.convert.methods.fitted import REFINE_STEPS
from transmla.deepseek.sizes import MLASizes
from transmla.deepseek.target_spec import TargetSpec

SINGLE, DOUBLE, COMPLEX = 4, 8, 16
# As in `transmla.calibration.moments`: probabilities at once, and queries between two that are pooled.
_PROBABILITIES, _STRIDE = 2**21, 4


@dataclass(frozen=True, eq=False)
class Holdings:
    """A conversion, as far as its memory depends on it.

    Attributes:
        request: the text's length, and how it is worked on.
        spec: of the source, with what the target keeps.
        sizes: of the target.
        layer: shape of every tensor of a target's decoder layer, by name.
        method: with its traits.
        counts: of the windows.
        stored: type of the source's weights.
        dtype: of the written ones.
        with_text: whether the layers are fitted to a text.
        predicts: whether splits of the cache are compared first.
        scales: whether what is added to the residual stream is scaled.
    """

    request: ConvertRequest
    spec: TargetSpec
    sizes: MLASizes
    layer: Mapping[str, Iterable[int]]
    method: Method
    counts: WindowCounts
    stored: torch.dtype
    dtype: torch.dtype
    with_text: bool
    predicts: bool
    scales: bool

    @property
    def source_layer(self) -> int:
        """A source layer as it is stored, in the type of the products and its attention in float32; the streams."""
        spec = self.spec
        projections = (2 * self.queries + 2 * self.keys) * spec.hidden_size
        mlp = 3 * spec.intermediate_size * spec.hidden_size if spec.mixture is None else 0
        runs = self.computed.itemsize if self.with_text and self.computed != self.stored else 0
        return (projections + mlp) * (self.stored.itemsize + runs) + projections * SINGLE + self.streams

    @property
    def scaled(self) -> int:
        """Bytes of a stored number in float32, and times a factor."""
        return SINGLE if self.stored == torch.float32 else 2 * SINGLE

    @property
    def lessons(self) -> int:
        """Inputs and wanted outputs of the windows to learn on, and of those held out."""
        if not self.with_text:
            return 0
        tokens = self.tokens if self.method.learns_on_converted else self.tokens - self.fit_tokens
        return tokens * (self.input_size + self.spec.hidden_size) * SINGLE

    @property
    def sums(self) -> int:
        """Sums of the moments; exact layers need none."""
        if not self.method.needs_moments:
            return 0
        return 2 * self.input_size**2 * DOUBLE + self.keys_moment + self.values_moment

    @property
    def moments(self) -> int:
        """Moments as they are kept; without text all heads have the same."""
        if self.with_text or not self.method.needs_moments:
            return self.sums
        return (2 * self.input_size**2 + 2 * self._joint**2) * DOUBLE

    @property
    def finishing(self) -> int:
        """The moments made of their sums: quotients, products, and what makes an indefinite one definite."""
        pooled = self.fit_tokens // _STRIDE
        # A moment of fewer tokens than numbers has no Cholesky factor, so that its eigenvectors are needed.
        definite = self._joint < min(pooled, self.input_size)
        return self.keys_moment + (4 if definite else 5) * self.values_moment

    @property
    def pooling(self) -> int:
        """Pooled tokens of a piece, keys weighted for each head, and the products of both."""
        tokens, heads = self.request.window * self._piece, self.spec.num_attention_heads
        return tokens * self._joint * (2 * heads // _STRIDE + 2 * self.spec.num_key_value_heads) * SINGLE

    @property
    def searching(self) -> int:
        """Weights in float64; the way to the first functionals, or the search for better ones."""
        weights = (2 * self.queries + 2 * self.keys) * self.input_size * DOUBLE
        joint, width = self._joint, self.input_size
        start = width**2 * COMPLEX + 2 * self.queries * width * COMPLEX + 8 * joint**2 * DOUBLE
        return weights + max(start, self._refining if self.method.searches else 0, self._compressing)

    @property
    def _refining(self) -> int:
        """L-BFGS on the functionals: its history, and a cost with what its gradient needs."""
        spec, sizes = self.spec, self.sizes
        heads, joint = spec.num_attention_heads, self._joint
        history = 2 * REFINE_STEPS * sizes.cache_numbers * joint
        features = spec.head_dim + sizes.cache_numbers + 1
        turning = 4 * heads * (spec.head_dim + sizes.qk_rope_head_dim) * self.request.window
        by_head = heads * (6 * features**2 + 3 * joint * sizes.kv_lora_rank)
        by_group = spec.num_key_value_heads * 2 * sizes.cache_numbers * joint
        copied = self.keys_moment + (0 if self.with_text else self.values_moment)
        return (history + turning + by_head + by_group) * DOUBLE + copied

    @property
    def _compressing(self) -> int:
        """Queries through fewer numbers, or through one projection for all heads."""
        if self.sizes.q_lora_rank is None:
            return 0
        # Before heads are padded for an engine.
        numbers = self.spec.num_attention_heads * (self.spec.head_dim + self.sizes.qk_rope_head_dim)
        if self.request.q_lora_rank is None:
            return 2 * numbers * (self.input_size + self.sizes.q_lora_rank) * DOUBLE
        return (8 * numbers**2 + 3 * numbers * self.input_size) * DOUBLE

    @property
    def refitting(self) -> int:
        """Sums over the text in float64, a batch of what heads put out, and the solution."""
        hidden, queries = self.spec.hidden_size, self.queries
        solving = (queries**2 + 4 * queries * hidden) * DOUBLE
        summing = self.attending + 2 * self.batch * queries * SINGLE
        return (queries**2 + queries * hidden) * DOUBLE + max(solving, summing)

    @property
    def healing(self) -> int:
        """Factors, gradients, Adam's two moments, the best point, one to judge; what the backward pass needs."""
        half = 0 if self.computed == torch.float32 else self.attention * self.computed.itemsize
        return 7 * self.attention * SINGLE + half + 5 * self.attending // 2

    @property
    def attending(self) -> int:
        """Queries, keys and values of a batch as the converted attention makes them, padded to one size."""
        sizes = self.sizes
        return self.batch * self.spec.num_attention_heads * (5 * sizes.qk_head_dim + sizes.qk_rope_head_dim) * SINGLE

    @property
    def passing(self) -> int:
        """A batch inside a decoder layer."""
        wide = 0 if self.spec.mixture else 3 * self.spec.intermediate_size * self.computed.itemsize
        return self.batch * (wide + 6 * self.spec.hidden_size * SINGLE)

    def probabilities(self, piece: int | None = None) -> int:
        """Logits, probabilities and costs of a piece, and the sums of one window's costs along diagonals."""
        each = self.spec.num_attention_heads * self.request.window**2
        return (3 * (piece or self._piece) + 4) * each * SINGLE

    # Sizes.

    @cached_property
    def computed(self) -> torch.dtype:
        """Type of the matrix products."""
        dtype: torch.dtype = getattr(torch, self.request.compute_dtype)
        return dtype

    @property
    def queries(self) -> int:
        """Numbers in the queries of one token, all heads together."""
        return self.spec.num_attention_heads * self.spec.head_dim

    @property
    def keys(self) -> int:
        """Numbers in the keys of one token, all heads together."""
        return self.spec.key_size

    @property
    def _joint(self) -> int:
        return self.spec.cache_numbers

    @property
    def input_size(self) -> int:
        """Numbers in an input of attention."""
        return self.spec.input_size

    @property
    def query_input(self) -> int:
        """Numbers that a head makes its queries of."""
        return self.input_size if self.sizes.q_lora_rank is None else self.sizes.q_lora_rank

    @property
    def keys_moment(self) -> int:
        """The moments of keys and values, one for each key/value head."""
        return self.spec.num_key_value_heads * self._joint**2 * DOUBLE

    @property
    def values_moment(self) -> int:
        """The moments of what is pooled, one for each head."""
        return self.spec.num_attention_heads * self._joint**2 * DOUBLE

    @property
    def fit_tokens(self) -> int:
        """Tokens that are fitted on."""
        return self.counts.num_fit * self.request.window

    @property
    def tokens(self) -> int:
        """Tokens of the whole text."""
        return self.fit_tokens + self.counts.num_heldout * self.request.window

    @property
    def batch(self) -> int:
        """Tokens at once."""
        windows = max(self.counts.num_fit, self.counts.num_heldout)
        return min(self.request.batch_size, windows) * self.request.window

    @property
    def _piece(self) -> int:
        """Windows whose probabilities are held at once."""
        each = self.spec.num_attention_heads * self.request.window**2
        return max(1, min(self.batch // self.request.window, _PROBABILITIES // each))

    @property
    def num_streams(self) -> int:
        """Residual streams: the source's, and that of the converted layers."""
        return 2 if self.method.learns_on_converted else 1

    @property
    def stream(self) -> int:
        """One residual stream."""
        return self.tokens * self.spec.hidden_size * SINGLE

    @property
    def streams(self) -> int:
        """All of them."""
        return self.num_streams * self.stream if self.with_text else 0

    @cached_property
    def attention(self) -> int:
        """Numbers of the converted attention."""
        return sum(math.prod(shape) for name, shape in self.layer.items() if ".self_attn." in name)

    @property
    def scaled_numbers(self) -> int:
        """Numbers of the largest weight that is scaled besides the attention's and the experts'."""
        return self.spec.intermediate_size * self.spec.hidden_size if self.scales and self.spec.mixture is None else 0

    @property
    def others(self) -> int:
        """What is written besides attention and experts: the source's own tensors where they need no change."""
        numbers = sum(math.prod(shape) for name, shape in self.layer.items() if not is_expert(name))
        changed = self.scaled_numbers if self.stored == self.dtype else numbers - self.attention
        return changed * self.dtype.itemsize
