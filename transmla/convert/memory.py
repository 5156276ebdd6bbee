"""How much memory a conversion takes, from sizes alone: the most that any of its stages takes, one method a stage.

Each stage counts what the code holds: what waits from the stages before, and what it makes besides. Numbers are
multiplied by their bytes, 4 in float32 and 8 in float64; what has a single axis is left out.
``scripts/bench_memory.py`` runs conversions and puts what they really took beside what is said here.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from transmla.arch.experts import is_expert
from transmla.arch.spec import AttentionSpec
from transmla.config import ConvertRequest
from transmla.convert.layer import REFINE_STEPS
from transmla.convert.sizes import PREDICTION_WINDOWS, MLASizes

#: What Python, PyTorch and Transformers take, with a tokenizer and a skeleton of the model: whatever is converted.
LIBRARIES = 450_000_000
# What the allocator holds between blocks, beyond what is asked of it: a share, up to what smaller blocks may add up to,
# for the largest are given back at once (`transmla.device.reuse_memory`).
_HELD, _MOST_HELD = 0.25, 350_000_000
_SINGLE, _DOUBLE, _COMPLEX = 4, 8, 16
# As in `transmla.calibration.moments`: probabilities at once, and queries between two that are pooled.
_PROBABILITIES, _STRIDE = 2**21, 4


@dataclass(frozen=True, eq=False)
class Footprint:
    """A conversion, as far as its memory depends on it.

    Attributes:
        request: the text's length, and how it is worked on.
        spec: of the source, with what the target keeps.
        sizes: of the target.
        layer: shape of every tensor of a target's decoder layer, by name.
        method: ``exact``, ``complex`` or ``rorope``.
        stored: type of the source's weights.
        dtype: of the written ones.
        with_text: whether the layers are fitted to a text.
        predicts: whether splits of the cache are compared first.
        scales: whether what is added to the residual stream is scaled.
    """

    request: ConvertRequest
    spec: AttentionSpec
    sizes: MLASizes
    layer: Mapping[str, Iterable[int]]
    method: str
    stored: torch.dtype
    dtype: torch.dtype
    with_text: bool
    predicts: bool
    scales: bool

    @property
    def peak(self) -> int:
        """Bytes of the whole process, the libraries among them."""
        asked = max(stage() for stage in self.stages.values())
        return LIBRARIES + asked + round(min(_HELD * asked, _MOST_HELD))

    @property
    def stages(self) -> Mapping[str, Callable[[], int]]:
        """The stages that this conversion has, in their order."""
        stages = {"embedding": self.embedding, "reading": self.reading}
        if self.with_text:
            stages["observing"] = self.observing
            if self.predicts and self.method == "complex":
                stages["predicting"] = self.predicting
            if self.spec.nonlinear:
                stages["linearizing"] = self.linearizing
            if self.method == "complex":
                stages["learning"] = self.learning
            stages["advancing"] = self.advancing
        if self.method != "exact":
            stages["splitting"] = self.splitting
        stages["folding"] = self.folding
        if self.spec.mixture:
            stages["experts"] = self.experts
        return stages

    # Stages.

    def embedding(self) -> int:
        """The embedding, read and scaled in float32; or read, and the streams of the text taken from it."""
        numbers = self.spec.vocab_size * self.spec.hidden_size
        scaled = numbers * (self.stored.itemsize + (self._scaled if self.scales else self.dtype.itemsize))
        looked_up = numbers * self.stored.itemsize + self._stream + self._stream * self.stored.itemsize // _SINGLE
        return max(scaled, looked_up if self.with_text else 0)

    def reading(self) -> int:
        """A source layer as it is stored and as it runs, beside the streams."""
        return self._layer

    def linearizing(self) -> int:
        """Regressions on all inputs: of both streams, with moments of each projection's inputs, and their solutions."""
        width, outputs = self._input, self._queries + self._keys
        inputs = 2 * self._fit_tokens * width * _SINGLE
        sums = len(self.spec.nonlinear) * (width**2 + outputs * width) * _DOUBLE
        solving = (3 * width**2 + 5 * self._queries * width) * _DOUBLE
        return self._layer + inputs + sums + max(self._probabilities(1), solving)

    def observing(self) -> int:
        """Moments are summed over the text, then finished while the sums are there, then held-out windows follow."""
        before = self._layer + self._lessons + self._sums
        if self.method == "exact":
            return before + self._pass
        batch = self._batch * (self._queries + 2 * self._keys + 2 * self._input) * _SINGLE
        adding = (self._keys_moment + self._values_moment) // 2 + batch + self._probabilities() + self._pooling
        return before + max(adding + self._pass // 2, self._finishing, self._sums + self._pass)

    def predicting(self) -> int:
        """As observing, on a few windows, with the moments of the layer before; then a search for each split."""
        tokens = min(PREDICTION_WINDOWS, self.request.num_windows) * self.request.window
        before = self._layer - self._streams + tokens * self.spec.hidden_size * _SINGLE + 2 * self._sums
        return before + max(self._finishing, self._searching)

    def splitting(self) -> int:
        """The weights in float64, and either the way to the first functionals or the search for better ones."""
        return self._layer + self._lessons + self._moments + self._searching + self._attention * _DOUBLE

    def learning(self) -> int:
        """The refit of the output, and Adam on all factors; the factors in float64 are there until that is done."""
        before = self._layer + self._lessons + self._moments + self._attention * (_DOUBLE + _SINGLE)
        return before + max(self._refitting, self._healing if self.request.heal_steps else 0)

    def folding(self) -> int:
        """The factors, the same in DeepSeek's format, and cast."""
        factor = _SINGLE if self.with_text or self.method == "exact" else _DOUBLE
        queries = self.spec.num_attention_heads * self.sizes.qk_head_dim * self._query_input
        cast = 0 if factor == self.dtype.itemsize else self.dtype.itemsize
        dense = self.scales and self.spec.mixture is None
        scaled = self._scaled * self.spec.intermediate_size * self.spec.hidden_size if dense else 0
        written = self._attention * (factor + cast) + (self._others if cast else 0) * cast + scaled
        # Queries are put together, and scaled.
        made = max(2 * queries * factor, written)
        return self._layer + self._lessons + self._moments + self._attention * factor + made

    def advancing(self) -> int:
        """What was written is read back in float32, judged, and passed by the converted stream."""
        written = self._attention * (2 * _SINGLE + self.dtype.itemsize) + self._others * self.dtype.itemsize
        output = self._queries * self.spec.hidden_size * _SINGLE
        judged = max(self._attending, self._pass if self.method == "complex" else 0)
        return self._layer + self._lessons + self._moments + written + output + judged

    def experts(self) -> int:
        """One expert read, in use and written, and what waits for its experts of both streams."""
        assert self.spec.mixture is not None
        numbers = 3 * self.spec.mixture.intermediate_size * self.spec.hidden_size
        one = numbers * (self.stored.itemsize + self._computed.itemsize + self._scaled + self.dtype.itemsize)
        # The inputs, and for each chosen expert its number in int64 and its weight.
        chosen = self.spec.mixture.num_experts_per_tok * (_DOUBLE + _SINGLE)
        waiting = self._num_streams * self._tokens * (self.spec.hidden_size * self._computed.itemsize + chosen)
        written = self._attention * (2 * _SINGLE + self.dtype.itemsize)
        return self._layer + self._lessons + self._moments + written + (waiting if self.with_text else 0) + one

    # What stages hold.

    @property
    def _layer(self) -> int:
        """A source layer as it is stored, in the type of the products and its attention in float32; the streams."""
        spec = self.spec
        projections = (2 * self._queries + 2 * self._keys) * spec.hidden_size
        mlp = 3 * spec.intermediate_size * spec.hidden_size if spec.mixture is None else 0
        runs = self._computed.itemsize if self.with_text and self._computed != self.stored else 0
        return (projections + mlp) * (self.stored.itemsize + runs) + projections * _SINGLE + self._streams

    @property
    def _scaled(self) -> int:
        """Bytes of a stored number in float32, and times a factor."""
        return _SINGLE if self.stored == torch.float32 else 2 * _SINGLE

    @property
    def _lessons(self) -> int:
        """Inputs and wanted outputs of the windows to learn on, and of those held out."""
        if not self.with_text:
            return 0
        tokens = self._tokens if self.method == "complex" else self._tokens - self._fit_tokens
        return tokens * (self._input + self.spec.hidden_size) * _SINGLE

    @property
    def _sums(self) -> int:
        """Sums of the moments; exact layers need none."""
        if self.method == "exact":
            return 0
        return 2 * self._input**2 * _DOUBLE + self._keys_moment + self._values_moment

    @property
    def _moments(self) -> int:
        """Moments as they are kept; without text all heads have the same."""
        if self.with_text or self.method == "exact":
            return self._sums
        return (2 * self._input**2 + 2 * self._joint**2) * _DOUBLE

    @property
    def _finishing(self) -> int:
        """The moments made of their sums: quotients, products, and what makes an indefinite one definite."""
        pooled = self._fit_tokens // _STRIDE
        # A moment of fewer tokens than numbers has no Cholesky factor, so that its eigenvectors are needed.
        definite = self._joint < min(pooled, self._input)
        return self._keys_moment + (4 if definite else 5) * self._values_moment

    @property
    def _pooling(self) -> int:
        """Pooled tokens of a piece, keys weighted for each head, and the products of both."""
        tokens, heads = self.request.window * self._piece, self.spec.num_attention_heads
        return tokens * self._joint * (2 * heads // _STRIDE + 2 * self.spec.num_key_value_heads) * _SINGLE

    @property
    def _searching(self) -> int:
        """Weights in float64; the way to the first functionals, or the search for better ones."""
        weights = (2 * self._queries + 2 * self._keys) * self._input * _DOUBLE
        joint, width = self._joint, self._input
        start = width**2 * _COMPLEX + 2 * self._queries * width * _COMPLEX + 8 * joint**2 * _DOUBLE
        return weights + max(start, self._refining if self.method == "complex" else 0, self._compressing)

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
        copied = self._keys_moment + (0 if self.with_text else self._values_moment)
        return (history + turning + by_head + by_group) * _DOUBLE + copied

    @property
    def _compressing(self) -> int:
        """Queries through fewer numbers, or through one projection for all heads."""
        if self.sizes.q_lora_rank is None:
            return 0
        # Before heads are padded for an engine.
        numbers = self.spec.num_attention_heads * (self.spec.head_dim + self.sizes.qk_rope_head_dim)
        if self.request.q_lora_rank is None:
            return 2 * numbers * (self._input + self.sizes.q_lora_rank) * _DOUBLE
        return (9 * numbers**2 + 3 * numbers * self._input) * _DOUBLE

    @property
    def _refitting(self) -> int:
        hidden, queries = self.spec.hidden_size, self._queries
        solving = (queries**2 + 4 * queries * hidden) * _DOUBLE
        summing = self._attending + 2 * self._batch * queries * _SINGLE
        return (queries**2 + queries * hidden) * _DOUBLE + max(solving, summing)

    @property
    def _healing(self) -> int:
        """Factors, gradients and Adam's two moments; what the backward pass needs of a batch."""
        half = 0 if self._computed == torch.float32 else self._attention * self._computed.itemsize
        return 5 * self._attention * _SINGLE + half + 5 * self._attending // 2

    @property
    def _attending(self) -> int:
        """Queries, keys and values of a batch as the converted attention makes them, padded to one size."""
        sizes = self.sizes
        return self._batch * self.spec.num_attention_heads * (5 * sizes.qk_head_dim + sizes.qk_rope_head_dim) * _SINGLE

    @property
    def _pass(self) -> int:
        """A batch inside a decoder layer."""
        wide = 0 if self.spec.mixture else 3 * self.spec.intermediate_size * self._computed.itemsize
        return self._batch * (wide + 6 * self.spec.hidden_size * _SINGLE)

    def _probabilities(self, piece: int | None = None) -> int:
        """Logits, probabilities and costs of a piece, and the sums of one window's costs along diagonals."""
        each = self.spec.num_attention_heads * self.request.window**2
        return (3 * (piece or self._piece) + 4) * each * _SINGLE

    # Sizes.

    @cached_property
    def _computed(self) -> torch.dtype:
        computed: torch.dtype = getattr(torch, self.request.compute_dtype)
        return computed

    @property
    def _queries(self) -> int:
        return self.spec.num_attention_heads * self.spec.head_dim

    @property
    def _keys(self) -> int:
        return self.spec.key_size

    @property
    def _joint(self) -> int:
        return self.spec.cache_numbers

    @property
    def _input(self) -> int:
        return self.spec.input_size

    @property
    def _query_input(self) -> int:
        return self._input if self.sizes.q_lora_rank is None else self.sizes.q_lora_rank

    @property
    def _keys_moment(self) -> int:
        return self.spec.num_key_value_heads * self._joint**2 * _DOUBLE

    @property
    def _values_moment(self) -> int:
        return self.spec.num_attention_heads * self._joint**2 * _DOUBLE

    @property
    def _fit_tokens(self) -> int:
        return self.request.num_windows * self.request.window

    @property
    def _tokens(self) -> int:
        return self._fit_tokens + self.request.num_heldout_windows * self.request.window

    @property
    def _batch(self) -> int:
        windows = max(self.request.num_windows, self.request.num_heldout_windows)
        return min(self.request.batch_size, windows) * self.request.window

    @property
    def _piece(self) -> int:
        """Windows whose probabilities are held at once."""
        each = self.spec.num_attention_heads * self.request.window**2
        return max(1, min(self._batch // self.request.window, _PROBABILITIES // each))

    @property
    def _num_streams(self) -> int:
        return 2 if self.method == "complex" else 1

    @property
    def _stream(self) -> int:
        return self._tokens * self.spec.hidden_size * _SINGLE

    @property
    def _streams(self) -> int:
        return self._num_streams * self._stream if self.with_text else 0

    @cached_property
    def _attention(self) -> int:
        """Numbers of the converted attention."""
        return sum(math.prod(shape) for name, shape in self.layer.items() if ".self_attn." in name)

    @cached_property
    def _others(self) -> int:
        """Numbers of the target's layer besides its attention and its routed experts."""
        numbers = sum(math.prod(shape) for name, shape in self.layer.items() if not is_expert(name))
        return numbers - self._attention
