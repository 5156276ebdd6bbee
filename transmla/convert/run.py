"""The spine: open, describe, plan; per layer calibrate, convert, write; publish."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from transmla.calibration.windows import add_repeats
from transmla.checkpoint.checksums import weight_checksums
from transmla.checkpoint.disk import output_errors
from transmla.checkpoint.model_files import RECIPE_FILE, REPORT_FILE, copy_model_files
from transmla.checkpoint.publish import Staging
from transmla.checkpoint.writer import CheckpointWriter
from transmla.config import ConvertRequest
from transmla.convert.layers import convert_layers
from transmla.convert.model_card import model_card
from transmla.convert.plan import FEWEST_WINDOWS, ConversionPlan, plan_conversion
from transmla.convert.predict import predict_splits
from transmla.convert.report import CalibrationReport, ConversionReport, LayerReport
from transmla.convert.sizes import candidate_splits
from transmla.convert.source_layers import as_stored
from transmla.data.documents import Documents, with_text
from transmla.data.synthetic import whole_words
from transmla.data.text import load_tokenizer, mixed_windows
from transmla.data.tokens import check_known, text_start
from transmla.device import trim_memory
from transmla.errors import CheckpointError, DataError
from transmla.progress import Progress, Silent, say_nothing
from transmla.records import FORMAT_VERSION
from transmla.versions import loaded_versions


def convert(
    request: ConvertRequest,
    *,
    progress: Progress | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], None] = say_nothing,
) -> ConversionReport:
    """Convert a checkpoint and publish the result.

    Args:
        request: what is wanted.
        progress: who is told how far the work has come.
        resume: continue an interrupted run of the same request; the result has the same bytes.
        overwrite: replace an output folder that exists.
        tell: is given what may not be as it was meant, before the work.

    Raises:
        TransMLAError: the request cannot be carried out. No output appears; finished layers of a run that can be
            continued are kept beside it.
    """
    started = time.monotonic()
    plan, windows = prepare(
        request, progress=progress, overwrite=overwrite, predict=request.kv_ratio is not None, dry=False, tell=tell
    )
    request, identity = plan.request, plan.identity(windows)
    with Staging(request.output_dir, identity=identity, resume=resume, overwrite=overwrite) as staging:
        writer = CheckpointWriter(staging.folder, plan.shards, resume=staging.resumed, check=staging.check)
        layers = [LayerReport.model_validate(entry) for entry in staging.journal.entries]
        for layer in layers:
            writer.mark_written(tensor.name for tensor in plan.layer_tensors(layer.layer))
        with (progress or Silent()).task("Converting layers", plan.spec.num_hidden_layers) as advance:
            advance(len(layers))
            for layer_report in convert_layers(
                plan, windows, write=writer.write, start=len(layers), read_stored=writer.read
            ):
                # On the disk before it is noted.
                writer.flush()
                staging.journal.append(layer_report.model_dump())
                layers.append(layer_report)
                advance(1)
        _write_outer_tensors(plan, writer)
        writer.finish()
        if not plan.is_unchanged(identity, windows):
            raise CheckpointError(
                f"The source {plan.source.name} was changed while it was converted, so that the result would be made "
                "of two models; convert again when it is complete."
            )
        report = ConversionReport(
            format_version=FORMAT_VERSION,
            plan=plan.summary,
            source_revision=plan.source.revision,
            calibration=_calibration_report(plan, windows),
            layers=tuple(layers),
            seconds=round(time.monotonic() - started, 1),
            checksums=weight_checksums(staging.folder, progress=progress),
            versions=loaded_versions(),
        )
        with output_errors(staging.folder):
            copy_model_files(plan.source.folder, staging.folder)
            _write_texts(plan, report, staging)
        staging.publish()
    return report


def prepare(
    request: ConvertRequest,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    predict: bool = True,
    dry: bool = True,
    tell: Callable[[str], None] = say_nothing,
) -> tuple[ConversionPlan, Int[Tensor, "windows tokens"] | None]:
    """Plan a conversion and read its text; with a ratio instead of sizes, take the split that is predicted to be best.

    Args:
        request: what is wanted.
        progress: who is told how far the predictions have come.
        overwrite: an output folder may exist.
        predict: predict the error of what the request leaves open, or of the one size that it names.
        dry: nothing will be written, so a disk that is too small is only told.
        tell: is given what may not be as it was meant, a sentence each.

    Raises:
        TransMLAError: the request cannot be carried out.
    """
    plan = plan_conversion(request, overwrite=overwrite)
    if not dry:
        plan.check_space()
    for warning in plan.warnings():
        tell(warning)
    if not plan.needs_text:
        return plan, None
    plan, windows = calibration_windows(plan, tell=tell)
    if not plan.method.predicts or not predict:
        return plan, windows
    splits = candidate_splits(plan.request, plan.spec)
    predictions = predict_splits(plan, windows, splits, progress=progress)
    if len(splits) > 1:
        # From here on the sizes are as though they had been given: the recipe repeats the result without the search.
        best = predictions[0].model_dump(include={"kv_lora_rank", "qk_rope_head_dim"})
        plan = plan.at(plan.request.model_copy(update={"kv_ratio": None, **best}))
    return replace(plan, predictions=predictions), windows


def calibration_windows(
    plan: ConversionPlan, *, tell: Callable[[str], None] = say_nothing
) -> tuple[ConversionPlan, Int[Tensor, "windows tokens"]]:
    """Read the text: return the plan with what was found, and the windows to fit on, then those held out.

    Args:
        plan: of the conversion.
        tell: is given what became of rows that are not read, a sentence each.

    Raises:
        DataError: the text is absent, unreadable or too short.
        CheckpointError: there is no tokenizer, or not one that can be read.
    """
    request = plan.request
    assert request.calibration
    if request.window > plan.spec.max_position_embeddings:
        raise DataError(
            f"--window {request.window} is longer than the model's context of {plan.spec.max_position_embeddings}."
        )
    tokenizer = load_tokenizer(plan.source)
    texts = [Documents(text, text_column=request.text_column, tokenizer=tokenizer) for text in request.calibration]
    start = text_start(tokenizer, request.bos)
    heldout = request.num_heldout_windows
    natural = mixed_windows(
        [with_text(text) for text in texts],
        tokenizer,
        window=request.window,
        num_windows=plan.counts.natural + heldout,
        at_least=None if request.num_windows else FEWEST_WINDOWS + heldout,
        seed=request.seed,
        start=start,
    )
    counts = plan.counts_with(len(natural) - heldout)
    windows = natural
    if counts.repeats or counts.heldout_repeats:
        words = whole_words(tokenizer, vocab_size=plan.spec.vocab_size)
        windows = add_repeats(natural, counts, words=words, seed=request.seed, start=start)
    check_known(windows, vocab_size=plan.spec.vocab_size)
    readings = tuple(text.reading for text in texts)
    for sentence in filter(None, (reading.sentence() for reading in readings)):
        tell(sentence)
    # What --repeats is by default may change; the recipe repeats the result all the same.
    request = request.model_copy(update={"repeats": plan.repeats})
    return replace(plan, request=request, num_windows=counts.natural, readings=readings), windows


def _write_outer_tensors(plan: ConversionPlan, writer: CheckpointWriter) -> None:
    """Write embedding, final norm and head; the head is untied and keeps the embedding's unscaled values."""
    family, headers = plan.spec.family, plan.reader.headers
    # An embedding may be larger than all that a layer needs, and is not to come on top of it.
    trim_memory()
    for tensor in plan.outer_tensors():
        name = tensor.name if tensor.name in headers else family.embedding
        [weight] = plan.reader.read([name]).values()
        writer.write({tensor.name: as_stored(plan, tensor.name, weight)})


def _calibration_report(plan: ConversionPlan, windows: Tensor | None) -> CalibrationReport | None:
    if windows is None:
        return None
    request, counts = plan.request, plan.counts
    return CalibrationReport(
        datasets=request.calibration,
        num_windows=counts.natural,
        num_repeats=counts.repeats,
        num_heldout_windows=counts.heldout_natural,
        num_heldout_repeats=counts.heldout_repeats,
        window=request.window,
        seed=request.seed,
        bos=request.bos,
        rows=plan.readings,
        sha256=hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    )


def _write_texts(plan: ConversionPlan, report: ConversionReport, staging: Staging) -> None:
    texts: Mapping[str, str] = {
        "config.json": json.dumps(plan.config, indent=2) + "\n",
        "README.md": model_card(plan, report),
        RECIPE_FILE: plan.request.to_yaml(),
        REPORT_FILE: report.model_dump_json(indent=2) + "\n",
    }
    for name, text in texts.items():
        (staging.folder / name).write_text(text, encoding="utf-8")
