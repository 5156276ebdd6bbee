"""An evaluation in the model card of a converted model: between two marks, so that the next one takes its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from transmla.errors import OutputError, UsageError
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.report.tables import TextTable, report_tables_of

_START, _END = "<!-- transmla eval: start -->", "<!-- transmla eval: end -->"
_CARD_FILE = "README.md"


def check_cards(models: Sequence[str]) -> None:
    """Refuse, before anything is measured, models that have no card here.

    Raises:
        UsageError: one is not a folder.
    """
    if not models:
        raise UsageError("--update-card writes into the cards of converted models: pass CONVERTED.")
    for model in models:
        if not Path(model).expanduser().is_dir():
            raise UsageError(f"--update-card writes into folders, and {model} is none: download it, or drop the flag.")


def update_cards(report: EvalReport) -> None:
    """Write the numbers of each converted model, and of the source, into its card.

    Raises:
        OutputError: a card cannot be written.
    """
    for number in range(1, len(report.models)):
        card = Path(report.models[number].name).expanduser() / _CARD_FILE
        try:
            text = card.read_text(encoding="utf-8") if card.exists() else ""
            unfinished = card.with_name(f".{_CARD_FILE}.part")
            unfinished.write_text(with_evaluation(text, _of_two(report, number)), encoding="utf-8")
            unfinished.replace(card)
        except OSError as error:
            raise OutputError(f"{card} cannot be written: {error.strerror or error}.") from None


def with_evaluation(card: str, report: EvalReport) -> str:
    """Return a card with an evaluation at its end, or in the place of the one before."""
    sheets = "\n\n".join(_markdown(sheet) for sheet in report_tables_of(report))
    versions = report.versions
    section = (
        f"{_START}\n## Evaluation\n\n{sheets}\n\nMeasured by transmla {versions.transmla} in {report.dtype} with torch "
        f"{versions.torch} and transformers {versions.transformers}.\n{_END}"
    )
    marked = re.compile(f"{re.escape(_START)}.*?{re.escape(_END)}", re.DOTALL)
    if marked.search(card):
        return marked.sub(lambda _: section, card, count=1)
    return f"{card.rstrip()}\n\n{section}\n".lstrip()


def _of_two(report: EvalReport, number: int) -> EvalReport:
    """Return what a report says about the source and one other model."""

    def chosen(records: Sequence[object]) -> tuple[object, ...]:
        return (records[0], records[number])

    # A path of this machine means nothing to others, so a folder is called by its name.
    models = [model.model_copy(update={"name": Path(model.name).name}) for model in report.models]
    scored = {
        field: tuple(part.model_copy(update={"scores": chosen(part.scores)}) for part in getattr(report, field))
        for field in ("texts", "tasks", "contexts")
    }
    return report.model_copy(
        update={
            **scored,
            "models": chosen(models),
            "greedy": tuple(part.model_copy(update={"scores": (part.scores[number - 1],)}) for part in report.greedy),
            "layers": report.layers[number - 1 : number],
        }
    )


def _markdown(sheet: TextTable) -> str:
    lines = [sheet.headings, ("---", *["---:"] * (len(sheet.headings) - 1)), *sheet.rows]
    cells = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{sheet.title}**\n\n" + "\n".join(cells)
