"""Files of items in lm-eval's terms: three forms, each of which needs no YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transmla.errors import DataError

TASK_FILES = {".yaml", ".yml", ".jsonl"}
_FORMS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    ("contexts", "continuation", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "contexts",
        "doc_to_target": "continuation",
        "metric_list": [{"metric": "acc"}],
    },
    ("query", "answer"): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
}


def items_config(path: Path) -> dict[str, Any]:
    """Describe a file of items in lm-eval's terms.

    lm-eval is given the items themselves and not the file, of which datasets keeps a copy: it would give the old ones
    of a file that was replaced with its time kept.

    Raises:
        DataError: it holds no items, or some that are not of one of the forms.
    """
    items = list(_read(path))
    if not items:
        raise DataError(f"The task file {path} holds no items.")
    needed = next((needed for needed in _FORMS if set(needed) <= items[0][1].keys()), None)
    if needed is None:
        raise DataError(
            f"The task file {path} has items of {', '.join(sorted(items[0][1]))}; needed are "
            f"{'; or '.join(', '.join(form) for form in _FORMS)}."
        )
    for line, item in items:
        if problem := _problem(item, needed):
            raise DataError(f"The task file {path} has {problem} in line {line}.")
    rows = [{field: item[field] for field in needed} for _, item in items]

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return {"task": path.stem, "custom_dataset": dataset, "test_split": "test", **_FORMS[needed]}


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                item = json.loads(line)
                if not isinstance(item, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield number, item
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"The task file {path} cannot be read: {error}.") from None


def _problem(item: dict[str, Any], needed: tuple[str, ...]) -> str | None:
    """Return what is wrong with an item, or nothing."""
    for field in needed:
        value = item.get(field)
        if field in ("choices", "contexts"):
            if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
                return f"{field} that are not a list of texts"
        elif field == "gold":
            texts = item[needed[0]] if needed[0] == "contexts" else item["choices"]
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(texts):
                return f"a gold that is not the index of one of its {len(texts)} texts, {json.dumps(value)}"
        elif not isinstance(value, str) or (not value and field != "query"):
            return f"no text under {field}"
    return None
