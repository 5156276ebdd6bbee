"""What a conversion method is: a file of this folder that states its traits and converts one layer.

The pipeline asks a method for its traits, never for its name. See docs/developers/add-a-method.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from transmla.arch.spec import AttentionSpec
from transmla.calibration.moments import AttentionWeights, Moments
from transmla.convert.latent_attention import LatentAttention
from transmla.deepseek.sizes import MLASizes


class MethodOptions(BaseModel):
    """What can be chosen of a method beyond the flags, for ablations (``method_options`` in a recipe)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    linear_ridge: float = Field(
        1e-6,
        ge=0,
        description="Pull of the linear maps that stand for norms and biases towards one factor for each number.",
    )


@dataclass(frozen=True, eq=False)
class LayerGoal:
    """What one layer is converted to.

    Attributes:
        kv_lora_rank: numbers of the latent.
        slot_frequencies: frequency of each rotary slot, in radians per token.
        pair_frequencies: frequency of each rotary pair of the source.
        folds: how many neighboring frequencies may share slots (FreqFold), to start from.
        context: longest distance, in tokens, at which a query may meet a key.
    """

    kv_lora_rank: int
    slot_frequencies: Float[Tensor, " slot"]
    pair_frequencies: Float[Tensor, " pair"]
    folds: tuple[int, ...]
    context: int


@dataclass(frozen=True, eq=False)
class ConvertedLayer:
    """A layer as a method converts it.

    Attributes:
        attention: the latent attention, in plain factors.
        freq_fold: the number of neighboring frequencies that share slots, where the method has one.
    """

    attention: LatentAttention
    freq_fold: int | None = None


class PredictedCost(NamedTuple):
    """Squared error of a layer's output, per token, by where it comes from; rounding may take it below zero."""

    keys: float
    values: float


class Method(ABC):
    """A way to write grouped-query attention as latent attention.

    Attributes:
        name: as ``--method`` has it.
        title: for tables.
        reference: the paper, where there is one.
        options_type: what can be chosen of it beyond the flags.
        exact: whether the logits equal the source's.
        repeats: windows of repeats as a share of the natural ones, without ``--repeats``.
        needs_moments: whether it depends on the text's second moments, or on those of white inputs without a text.
        rope_types: types of RoPE that it converts; any, where it is ``None``.
        takes_freq_fold: whether ``--freq-fold`` means anything to it.
        searches: whether it searches for the least predicted cost, which takes memory.
        predicts: whether it can tell the cost of a size without converting (:meth:`predict`).
        own_frequencies: whether every slot keeps the frequency of a pair, so that nothing depends on a grid.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str | None] = None
    options_type: ClassVar[type[MethodOptions]] = MethodOptions
    exact: ClassVar[bool] = False
    repeats: ClassVar[float] = 0.0
    needs_moments: ClassVar[bool] = True
    rope_types: ClassVar[frozenset[str] | None] = None
    takes_freq_fold: ClassVar[bool] = False
    searches: ClassVar[bool] = False
    predicts: ClassVar[bool] = False
    own_frequencies: ClassVar[bool] = False

    def __init__(self, options: MethodOptions) -> None:
        """Take the options, which are of ``options_type``."""
        self.options = options

    @property
    def learns_on_converted(self) -> bool:
        """Whether a layer is fitted on what the converted layers below it output, towards the source's stream."""
        return False

    @property
    def refits(self) -> bool:
        """Whether the output projection is refitted there."""
        return self.learns_on_converted

    def fixed_sizes(self, spec: AttentionSpec) -> MLASizes | None:
        """Return the only sizes that the method writes, where there is nothing to choose."""
        return None

    def choose_folds(self, folds: Sequence[int]) -> tuple[int, ...]:
        """Return those of the possible folds that a layer may start from, without ``--freq-fold``."""
        return ()

    @abstractmethod
    def convert(self, weights: AttentionWeights, moments: Moments | None, goal: LayerGoal) -> ConvertedLayer:
        """Convert the attention of one layer; ``moments`` are ``None`` where the method needs none."""

    def predict(self, weights: AttentionWeights, moments: Moments, goal: LayerGoal) -> PredictedCost:
        """Predict what errors in keys and in values will cost the layer's output, without converting it."""
        raise NotImplementedError
