"""The texts beside trained weights: recipe, report, and a model card that says what was done."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from transmla.checkpoint.disk import output_errors
from transmla.checkpoint.model_files import FINETUNE_RECIPE_FILE, FINETUNE_REPORT_FILE
from transmla.config import FinetuneRequest
from transmla.finetune.report import FinetuneReport

_CARD_FILE = "README.md"
_CARD = """---
{metadata}---

# {title}

{checkpoint}, a model with Multi-head Latent Attention in DeepSeek-V3's native format, trained further by transmla
{version}{teacher}. No remote code.

| held out | perplexity | KL to the teacher, nats |
|---|---|---|
{rows}

{steps:,} steps ({tokens:,} tokens) with `--train {train}`; these are the weights of step {best:,}, the best of what was
held out. The recipe is in `{recipe}`, every measurement in `{report}`.
"""


def publish_texts(
    request: FinetuneRequest, report: FinetuneReport, *, converted: Path, work: Path, folder: Path
) -> None:
    """Write recipe, report and card into the finished folder, and take along what loggers have left.

    Args:
        request: what was asked.
        report: what was measured.
        converted: folder of the checkpoint that came in.
        work: where loggers write.
        folder: the finished one.

    Raises:
        OutputError: the disk refuses.
    """
    texts = {
        _CARD_FILE: model_card(request, report, converted / _CARD_FILE),
        FINETUNE_RECIPE_FILE: request.to_yaml(),
        FINETUNE_REPORT_FILE: report.model_dump_json(indent=2) + "\n",
    }
    with output_errors(folder):
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        if (work / "runs").is_dir():
            shutil.copytree(work / "runs", folder / "runs")


def model_card(request: FinetuneRequest, report: FinetuneReport, before: Path) -> str:
    """Write the card as Markdown with the hub's metadata; the base model is that of the card before."""
    metadata = {
        **_base_model(before),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["transmla", "mla", "deepseek_v3"],
    }
    # A path of the machine that trained means nothing to others, so a folder is called by its name.
    points = {"before": report.heldout[0], "after": report.best} if report.best else {}
    rows = [
        f"| {name} | {point.perplexity:.4f} | {'-' if report.teacher is None else format(point.kl, '.4f')} |"
        for name, point in points.items()
        if point is not None
    ]
    return _CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        title=request.output_dir.resolve().name,
        checkpoint=Path(report.checkpoint).name,
        version=report.versions["transmla"],
        teacher=f" with {request.gguf_file or Path(report.teacher).name} for a teacher" if report.teacher else "",
        rows="\n".join(rows) or "| nothing was trained | | |",
        steps=report.steps,
        tokens=report.heldout[-1].num_tokens_seen if report.heldout else 0,
        train=request.train,
        best=report.best_step,
        recipe=FINETUNE_RECIPE_FILE,
        report=FINETUNE_REPORT_FILE,
    )


def _base_model(card: Path) -> dict[str, str]:
    try:
        _, metadata, _ = card.read_text(encoding="utf-8").split("---\n", 2)
        base = yaml.safe_load(metadata)["base_model"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}
    return {"base_model": base} if isinstance(base, str) else {}
