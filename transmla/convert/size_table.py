"""Which size to take: the predicted loss of a range of cache sizes, from one pass over a text, before any is converted.

Each share of the source's cache is split in a few ways between latent and rotary key, all of them are predicted on the
same windows (:mod:`transmla.convert.predict`), and of each share the best is shown, with what it caches and who loads
it.
"""

import math
import time
from collections.abc import Callable, Sequence

from transmla.config import ConvertRequest, SizesRequest
from transmla.config.refusal import TEXT, Change, Refusal, flags_of
from transmla.convert.candidates import propose_output
from transmla.convert.excess import MEASURED, MeasuredSize, excess_factor, how_far_off, predicted_excess
from transmla.convert.plan import ConversionPlan, plan_conversion
from transmla.convert.predict import predict_splits, prediction_windows
from transmla.convert.run import calibration_windows
from transmla.convert.sizes import candidate_splits
from transmla.convert.summary import Prediction
from transmla.deepseek.sizes import MLASizes
from transmla.errors import UsageError
from transmla.progress import Progress, say_nothing
from transmla.records import Record, Versions
from transmla.versions import loaded_versions

# Half and twice the rotary key of the plain rule: no split further away has been the best where it was measured.
_SPLITS_PER_SHARE = 3


class SizeRow(Record):
    """One cache size, at the best split that was compared.

    Attributes:
        predicted_excess: loss that a conversion without healing adds, in nats per token.
        share: numbers that are cached, as a share of the source's.
        kv_bytes_per_token: in the type of the output.
        peak_memory_bytes: of the conversion at this size.
        flags: of ``transmla convert``.
        engines: those whose rules the sizes meet.
        predictions: of all splits that were compared, the best first.
    """

    share: float
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    kv_bytes_per_token: int
    predicted_excess: float
    peak_memory_bytes: int
    flags: tuple[str, ...]
    engines: tuple[str, ...]
    predictions: tuple[Prediction, ...]


class SizesReport(Record):
    """Cache sizes of a model, the smallest first, with what each is predicted to cost.

    Attributes:
        source_kv_bytes_per_token: in the type that the source is stored in.
        num_windows, window: what the sizes were compared on.
        excess_factor: predicted excess for a squared error of one.
        measured: what that factor comes from.
        how_far_off: a sentence on how good such predictions were there.
    """

    model: str
    family: str
    datasets: tuple[str, ...]
    num_windows: int
    window: int
    source_dtype: str
    dtype: str
    source_kv_bytes_per_token: int
    sizes: tuple[SizeRow, ...]
    excess_factor: float
    measured: tuple[MeasuredSize, ...]
    how_far_off: str
    seconds: float
    versions: Versions


def compare_sizes(
    request: SizesRequest, *, progress: Progress | None = None, tell: Callable[[str], None] = say_nothing
) -> SizesReport:
    """Predict what a range of cache sizes would cost, in one pass over the text and without converting.

    Args:
        request: what is wanted.
        progress: who is told how far the work has come.
        tell: is given what may not be as it was meant, a sentence each.

    Raises:
        TransMLAError: the model cannot be converted, none of the shares can be met, or the text cannot be read.
    """
    started = time.monotonic()
    if request.calibration in ((), ("none",)):
        raise Refusal("Sizes are compared on a text", TEXT)
    plan, groups = _splits(request, tell)
    for warning in plan.warnings():
        tell(warning)
    plan, windows = calibration_windows(plan, tell=tell)
    every = list(dict.fromkeys(split for group in groups for split in group))
    found = {_numbers(one): one for one in predict_splits(plan, windows, every, progress=progress)}
    rows = (_row(request, plan, [found[_numbers(split)] for split in group]) for group in groups)
    summary = plan.summary
    return SizesReport(
        model=summary.model,
        family=summary.family,
        datasets=request.calibration,
        num_windows=len(prediction_windows(plan, windows)),
        window=request.window,
        source_dtype=summary.source_dtype,
        dtype=summary.dtype,
        source_kv_bytes_per_token=summary.source_kv_bytes_per_token,
        sizes=tuple(sorted(rows, key=lambda row: row.share)),
        excess_factor=excess_factor(),
        measured=MEASURED,
        how_far_off=how_far_off(),
        seconds=round(time.monotonic() - started, 1),
        versions=loaded_versions(),
    )


def _splits(
    request: SizesRequest, tell: Callable[[str], None]
) -> tuple[ConversionPlan, Sequence[tuple[MLASizes, ...]]]:
    """Return the plan of one share, which all have in common but the sizes, and the splits of each that is possible."""
    plan: ConversionPlan | None = None
    groups: dict[tuple[MLASizes, ...], None] = {}
    refused: list[tuple[float, Refusal]] = []
    for share in sorted(set(request.shares), reverse=True):
        wanted = _conversion(request, share)
        try:
            plan = plan_conversion(wanted, writes=False) if plan is None else plan.at(wanted)
        except Refusal as refusal:
            refused.append((share, refusal))
            continue
        # Several shares may lead to the same sizes, where an engine dictates them or few numbers are cached at all.
        groups[nearest_splits(candidate_splits(wanted, plan.spec))] = None
    if plan is None:
        largest, why = refused[0]
        raise UsageError(f"None of --shares is possible; of {largest:g} transmla convert says: {why}")
    for share, why in refused:
        tell(f"A share of {share:g} is left out: {why.reason}.")
    return plan, list(groups)


def nearest_splits(splits: Sequence[MLASizes]) -> tuple[MLASizes, ...]:
    """Return the few splits whose rotary keys are nearest in size to that of the first."""

    def distance(split: MLASizes) -> float:
        return abs(math.log2(split.qk_rope_head_dim / splits[0].qk_rope_head_dim))

    return tuple(sorted(splits, key=distance)[:_SPLITS_PER_SHARE])


def _conversion(request: SizesRequest, share: float) -> ConvertRequest:
    """Return the conversion that would be asked for; nothing is written to its folder."""
    common = SizesRequest.model_fields.keys() & ConvertRequest.model_fields.keys()
    return ConvertRequest(
        **{name: getattr(request, name) for name in common}, output_dir=propose_output(request.model), kv_ratio=share
    )


def _said(request: SizesRequest) -> Change:
    """Return what was asked for beyond the sizes, to be asked of the conversion as well."""
    own = {"model", "shares", "token"}
    fields = ((name, field.default) for name, field in SizesRequest.model_fields.items() if name not in own)
    return {name: getattr(request, name) for name, default in fields if getattr(request, name) != default}


def _row(request: SizesRequest, plan: ConversionPlan, predictions: Sequence[Prediction]) -> SizeRow:
    predictions = sorted(predictions, key=lambda prediction: prediction.error)
    best = predictions[0]
    sizes = {"kv_lora_rank": best.kv_lora_rank, "qk_rope_head_dim": best.qk_rope_head_dim}
    summary = plan.at(plan.request.model_copy(update={"kv_ratio": None, **sizes})).summary
    return SizeRow(
        **summary.model_dump(
            include={
                *("share", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
                *("kv_bytes_per_token", "peak_memory_bytes", "engines"),
            }
        ),
        predicted_excess=predicted_excess(best.error),
        flags=tuple(flags_of({**sizes, **_said(request)})),
        predictions=tuple(predictions),
    )


def _numbers(sizes: MLASizes | Prediction) -> tuple[int, int]:
    return sizes.kv_lora_rank, sizes.qk_rope_head_dim
