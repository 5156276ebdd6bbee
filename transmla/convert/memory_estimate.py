"""How much memory a conversion takes, from sizes alone: the most that any of its stages takes, one method a stage.

Each stage counts what the code holds: what waits from the stages before, and what it makes besides.
``scripts/benchmarks/memory.py`` runs conversions and puts what they really took beside what is said here.
"""

from collections.abc import Callable, Mapping

from transmla.convert.holdings import DOUBLE, SINGLE, Holdings
from transmla.convert.sizes import PREDICTION_WINDOWS

#: What Python, PyTorch and Transformers take, with a tokenizer and a skeleton of the model: whatever is converted.
LIBRARIES = 450_000_000
# What the allocator holds between blocks, beyond what is asked of it, as measured. The largest blocks are given back at
# once (`transmla.device.reuse_memory`), and an embedding or an exact layer has few others; moments are of every size.
_LITTLE_HELD, _HELD, _MOST_HELD = 0.05, 0.25, 350_000_000


class Footprint(Holdings):
    """The stages of a conversion."""

    @property
    def peak(self) -> int:
        """Bytes of the whole process, the libraries among them."""
        return LIBRARIES + max(self._with_gaps(name, stage()) for name, stage in self.stages.items())

    def _with_gaps(self, stage: str, asked: int) -> int:
        large = not self.method.needs_moments or stage == "embedding"
        return asked + round(_LITTLE_HELD * asked if large else min(_HELD * asked, _MOST_HELD))

    @property
    def stages(self) -> Mapping[str, Callable[[], int]]:
        """The stages that this conversion has, in their order."""
        stages = {"embedding": self.embedding, "reading": self.reading}
        if self.with_text:
            stages["observing"] = self.observing
            if self.predicts and self.method.predicts:
                stages["predicting"] = self.predicting
            if self.spec.nonlinear:
                stages["linearizing"] = self.linearizing
            if self.method.learns_on_converted:
                stages["learning"] = self.learning
            stages["advancing"] = self.advancing
        if self.method.needs_moments:
            stages["splitting"] = self.splitting
        stages["folding"] = self.folding
        if self.spec.mixture:
            stages["experts"] = self.experts
        return stages

    # Stages.

    def embedding(self) -> int:
        """The embedding, read and scaled in float32; or read, and the streams of the text taken from it."""
        numbers = self.spec.vocab_size * self.spec.hidden_size
        scaled = numbers * (self.stored.itemsize + (self.scaled if self.scales else self.dtype.itemsize))
        looked_up = numbers * self.stored.itemsize + self.stream + self.stream * self.stored.itemsize // SINGLE
        return max(scaled, looked_up if self.with_text else 0)

    def reading(self) -> int:
        """A source layer as it is stored and as it runs, beside the streams."""
        return self.source_layer

    def linearizing(self) -> int:
        """Regressions on all inputs: of both streams, with moments of each projection's inputs, and their solutions."""
        width, outputs = self.input_size, self.queries + self.keys
        inputs = 2 * self.fit_tokens * width * SINGLE
        sums = len(self.spec.nonlinear) * (width**2 + outputs * width) * DOUBLE
        solving = (3 * width**2 + 5 * self.queries * width) * DOUBLE
        return self.source_layer + inputs + sums + max(self.probabilities(1), solving)

    def observing(self) -> int:
        """Moments are summed over the text, then finished while the sums are there, then held-out windows follow."""
        before = self.source_layer + self.lessons + self.sums
        if not self.method.needs_moments:
            return before + self.passing
        batch = self.batch * (self.queries + 2 * self.keys + 2 * self.input_size) * SINGLE
        adding = (self.keys_moment + self.values_moment) // 2 + batch + self.probabilities() + self.pooling
        return before + max(adding + self.passing // 2, self.finishing, self.sums + self.passing)

    def predicting(self) -> int:
        """As observing, on a few windows, with the moments of the layer before; then a search for each split."""
        tokens = min(PREDICTION_WINDOWS, self.counts.num_fit) * self.request.window
        before = self.source_layer - self.streams + tokens * self.spec.hidden_size * SINGLE + 2 * self.sums
        return before + max(self.finishing, self.searching)

    def splitting(self) -> int:
        """The weights in float64, and either the way to the first functionals or the search for better ones."""
        return self.source_layer + self.lessons + self.moments + self.searching + self.attention * DOUBLE

    def learning(self) -> int:
        """The refit of the output, and Adam on all factors; the factors in float64 are there until that is done."""
        before = self.source_layer + self.lessons + self.moments + self.attention * (DOUBLE + SINGLE)
        return before + max(self.refitting, self.healing if self.request.heal_steps else 0)

    def folding(self) -> int:
        """The factors, the same in DeepSeek's format, and cast."""
        factor = SINGLE if self.with_text or not self.method.needs_moments else DOUBLE
        queries = self.spec.num_attention_heads * self.sizes.qk_head_dim * self.query_input
        cast = 0 if factor == self.dtype.itemsize else self.dtype.itemsize
        written = self.attention * (factor + cast) + self.others + self.scaled * self.scaled_numbers
        # Queries are put together, and scaled.
        made = max(2 * queries * factor, written)
        return self.source_layer + self.lessons + self.moments + self.attention * factor + made

    def advancing(self) -> int:
        """What was written is read back in float32, judged, and passed by the converted stream."""
        written = self.attention * (2 * SINGLE + self.dtype.itemsize) + self.others
        output = self.queries * self.spec.hidden_size * SINGLE
        judged = max(self.attending, self.passing if self.method.learns_on_converted else 0)
        return self.source_layer + self.lessons + self.moments + written + output + judged

    def experts(self) -> int:
        """One expert read, in use and written, and what waits for its experts of both streams."""
        assert self.spec.mixture is not None
        numbers = 3 * self.spec.mixture.intermediate_size * self.spec.hidden_size
        one = numbers * (self.stored.itemsize + self.computed.itemsize + self.scaled + self.dtype.itemsize)
        # The inputs, and for each chosen expert its number in int64 and its weight.
        chosen = self.spec.mixture.num_experts_per_tok * (DOUBLE + SINGLE)
        waiting = self.num_streams * self.tokens * (self.spec.hidden_size * self.computed.itemsize + chosen)
        written = self.attention * (2 * SINGLE + self.dtype.itemsize)
        return self.source_layer + self.lessons + self.moments + written + (waiting if self.with_text else 0) + one
