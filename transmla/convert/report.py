"""What a conversion has measured: ``transmla_report.json``."""

from transmla.convert.summary import PlanSummary
from transmla.data.documents import Reading
from transmla.records import Record, Versions


class LayerReport(Record):
    """One layer.

    Attributes:
        relative_error: how far the residual stream after the attention is from the source's, as a share of its length:
            root mean square over the tokens of held-out windows, as stored. All layers below are converted, too
            (rorope: are the source's); ``None`` without text.
        error_before_refit: the same before W_O is refitted.
        error_before_healing: the same before healing; ``None`` where nothing is healed.
        healing_gain: how much healing took off the squared error on the windows that judge it, as a share; 0 where the
            layer stayed as it was, ``None`` where nothing is healed.
        routing_error: share of a token's experts, by weight, that are others than in the source; mean over held-out
            windows.
        freq_fold: neighboring frequencies that share rotary slots; ``None`` in exact mode.
    """

    layer: int
    relative_error: float | None = None
    error_before_refit: float | None = None
    error_before_healing: float | None = None
    healing_gain: float | None = None
    routing_error: float | None = None
    freq_fold: int | None


class CalibrationReport(Record):
    """The text that was fitted on, and the windows that were held out.

    Attributes:
        num_windows: natural ones to fit on; ``num_heldout_windows`` natural ones to judge by.
        num_repeats: windows of repeats to fit on; ``num_heldout_repeats`` of them to judge by.
        bos: what windows begin with, as ``--bos`` says it.
        rows: what was read of the data sets, in their order, as far as windows were needed; none where an older version
            wrote them.
    """

    datasets: tuple[str, ...]
    num_windows: int
    num_repeats: int = 0
    num_heldout_windows: int
    num_heldout_repeats: int = 0
    window: int
    seed: int
    bos: str = "never"
    rows: tuple[Reading, ...] = ()
    sha256: str


class ConversionReport(Record):
    """Everything one needs to know where a checkpoint comes from.

    Attributes:
        format_version: of the report; 1 where none is written.
        checksums: SHA-256 of every weight file; none where an older version wrote them.
    """

    format_version: int = 1
    plan: PlanSummary
    source_revision: str | None
    calibration: CalibrationReport | None
    layers: tuple[LayerReport, ...]
    seconds: float
    versions: Versions
    checksums: dict[str, str] | None = None

    @property
    def num_healed(self) -> int | None:
        """Return how many layers healing has made better; ``None`` where nothing is healed."""
        gains = [layer.healing_gain for layer in self.layers if layer.healing_gain is not None]
        return sum(gain > 0 for gain in gains) if gains else None

    @property
    def mean_relative_error(self) -> float | None:
        """Return the mean over the layers that were measured."""
        errors = [layer.relative_error for layer in self.layers if layer.relative_error is not None]
        return sum(errors) / len(errors) if errors else None
