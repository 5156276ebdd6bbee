"""An evaluation in the model card of a converted model: between two marks, so that the next one replaces it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from transmla.checkpoint.disk import output_errors, replace_text
from transmla.errors import UsageError
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.report.tables import tables_of_one
from transmla.evaluate.report.text_table import TextTable

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
        with output_errors(card):
            text = card.read_text(encoding="utf-8") if card.exists() else ""
        replace_text(card, with_evaluation(text, report, number))


def with_evaluation(card: str, report: EvalReport, number: int) -> str:
    """Return a card with what was measured of a model, at its end or instead of what was there before."""
    tables = "\n\n".join(_markdown(table) for table in tables_of_one(report, number))
    versions = report.versions
    section = (
        f"{_START}\n## Evaluation\n\n{tables}\n\nMeasured by transmla {versions.transmla} in {report.dtype} with torch "
        f"{versions.torch} and transformers {versions.transformers}.\n{_END}"
    )
    marked = re.compile(f"{re.escape(_START)}.*?{re.escape(_END)}", re.DOTALL)
    if marked.search(card):
        return marked.sub(lambda _: section, card, count=1)
    return f"{card.rstrip()}\n\n{section}\n".lstrip()


def _markdown(table: TextTable) -> str:
    lines = [table.headings, ("---", *["---:"] * (len(table.headings) - 1)), *table.rows]
    cells = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{table.title}**\n\n" + "\n".join(cells)
