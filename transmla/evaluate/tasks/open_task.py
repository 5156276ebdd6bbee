"""Where tasks come from: lm-eval's own, a YAML file, or a file of items."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transmla.errors import DataError, TransMLAError
from transmla.evaluate.tasks.item_files import TASK_FILES, items_config

# Warnings of lm-eval's that are about how a task is written, or about what is meant to be so here.
_HARMLESS = (
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
    "[Task: ",
    "Overwriting default num_fewshot",
    "Custom kwargs can be passed",
    "No `until` specified",
    "No `generation_kwargs` specified",
    "passed `generation_kwargs`, but not using",
    "Metrics were not scored on the same number",
    "No aggregation function defined",
    "Higher_is_better values for metric",
    "metric '",
    "no values found for metric",
    "do_sample=",
    "Failed to get model SHA",
    "Duplicate ",
)


class OpenTask:
    """What a name or a file stands for: tasks, and groups of them."""

    def __init__(self, task: str, manager: Any, notes: list[str]) -> None:
        """Have lm-eval load a task; ``notes`` is what there is to tell about it."""
        self.task, self.manager, self.notes = task, manager, notes
        path = Path(task)
        loaded = manager.load([items_config(path) if path.suffix == ".jsonl" else _name_of_group(path, manager)])
        self.tasks: dict[str, Any] = loaded["tasks"]
        self.groups: dict[str, Any] = loaded.get("groups") or {}

    @property
    def roots(self) -> list[Any]:
        """Return the groups that are in no other, and the tasks that are in none."""
        inside = {name for group in self.groups.values() for name in group.child_names}
        return [item for items in (self.groups, self.tasks) for name, item in items.items() if name not in inside]

    def identity(self, *, num_fewshot: int | None) -> str:
        """Return the hash of what decides the answers: how the tasks are written, their code and their documents."""
        digest = hashlib.sha256()
        path = Path(self.task)
        if path.suffix in TASK_FILES:
            for file in [path, *sorted(path.parent.glob("*.py"))]:
                digest.update(file.read_bytes())
        for name, group in self.groups.items():
            digest.update(_plain([name, group.to_dict()]))
        for name, task in self.tasks.items():
            digest.update(_plain([name, str(task.VERSION), task.dump_config()]))
            for document in task.eval_docs:
                digest.update(_plain(document))
            if num_fewshot if num_fewshot is not None else task.get_config("num_fewshot"):
                for document in task.fewshot_docs() or ():
                    digest.update(_plain(document))
        return digest.hexdigest()


@contextmanager
def open_task(task: str) -> Iterator[OpenTask]:
    """Have lm-eval read a task and its documents.

    Raises:
        DataError: lm-eval does not know it, or cannot get its documents, or it has none.
    """
    with tempfile.TemporaryDirectory(prefix="transmla-tasks-") as scratch, _read_afresh(scratch), _overheard() as notes:
        with failures(task), _code_afresh(Path(task), scratch):
            try:
                opened = OpenTask(task, _manager(Path(task)), notes)
            except IndexError as error:
                # So a data set says that there is no first row, which lm-eval looks at before anything else.
                raise DataError(f"The task {task} seems to have no documents: {reason_of(error)}") from error
        if not opened.tasks:
            raise DataError(f"The task {task} is a group without tasks.")
        yield opened


def _manager(path: Path) -> Any:
    from lm_eval.tasks import TaskManager

    if path.suffix not in TASK_FILES:
        return _known_tasks()
    return TaskManager(include_path=None if path.suffix == ".jsonl" else str(path.parent), include_defaults=False)


def _name_of_group(path: Path, manager: Any) -> str:
    """Return the group that a file holds, which lm-eval finds by its name only; of other tasks what the user says."""
    for name in manager.all_groups:
        file = manager.task_index[name].yaml_path
        if file is not None and Path(file).resolve() == path.resolve():
            return str(name)
    return str(path)


@lru_cache(maxsize=1)
def _known_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def failures(task: str) -> Iterator[None]:
    """Give what lm-eval raises a sentence.

    Raises:
        DataError: whatever it is.
    """
    try:
        yield
    except TransMLAError:
        raise
    # Names that nobody knows, data sets that cannot be fetched: lm-eval and datasets fail in many ways.
    except Exception as error:
        raise DataError(f"lm-eval cannot run the task {task}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Return in one line what an error says."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _read_afresh(scratch: str) -> Iterator[None]:
    """Have datasets read files of this machine as they are now.

    It knows a file by its path and time, and would give the rows of one that was replaced with its time kept, as would
    whatever a task makes of them.
    """
    import datasets

    load = datasets.load_dataset

    def fresh(path: str, *args: Any, **options: Any) -> Any:
        if any(
            Path(file).exists() for file in (path, *_texts(options.get("data_files")), options.get("data_dir") or "-")
        ):
            options.setdefault("cache_dir", scratch)
        return load(path, *args, **options)

    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with patch.object(datasets, "load_dataset", fresh):
            yield
    finally:
        if not silent:
            datasets.enable_progress_bars()


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in lists and dictionaries of them."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


@contextmanager
def _code_afresh(path: Path, scratch: str) -> Iterator[None]:
    """Have Python read the code beside a task's file as it is now: lm-eval, and Python itself, know it by its time."""
    if path.suffix not in TASK_FILES:
        yield
        return
    for folder in {path.parent, path.parent.resolve()}:
        for file in folder.glob("*.py"):
            sys.modules.pop(str(file.with_suffix("")), None)
    with patch.object(sys, "pycache_prefix", scratch):
        yield


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """Collect what lm-eval warns of, each kind of it once, but for what is harmless."""
    logger, notes, seen = logging.getLogger("lm_eval"), [], set[str]()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = " ".join(record.getMessage().split())
            kind = re.sub(r"[\d.,]+", "0", message)[:60]
            if kind not in seen and not any(text in message for text in _HARMLESS):
                seen.add(kind)
                notes.append(f"lm-eval warns: {message[:300]}")

    ear, level, spreads = Ear(level=logging.WARNING), logger.level, logger.propagate
    logger.addHandler(ear)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield notes
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
        logger.propagate = spreads


def _plain(value: Any) -> bytes:
    """Write something down such that the same comes out the same in another process."""
    return re.sub(r" at 0x[0-9a-f]+", "", json.dumps(value, sort_keys=True, default=repr)).encode()
