"""The files of a model folder beside the weights: tokenizer, templates, license; recipe and report of transmla."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transmla.checkpoint.safe_paths import check_inside, read_json
from transmla.errors import CheckpointError
from transmla.records import FORMAT_VERSION

TOKENIZER_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# What a conversion leaves beside the weights: how it was made, and what it measured.
RECIPE_FILE, REPORT_FILE = "transmla_recipe.yaml", "transmla_report.json"
# The same of a training, beside those of the conversion that it started from.
FINETUNE_RECIPE_FILE, FINETUNE_REPORT_FILE = "transmla_finetune.yaml", "transmla_finetune.json"
LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")


def copy_model_files(source_folder: Path, output_dir: Path) -> tuple[str, ...]:
    """Copy the files of a model and return their names.

    Code stays behind, and so does ``auto_map``, the key by which a JSON file would ask for it.

    Raises:
        CheckpointError: a file is a link out of the folder, or is not the JSON it should be.
    """
    paths = [path for pattern in TOKENIZER_FILES for path in sorted(source_folder.glob(pattern)) if path.is_file()]
    names = []
    for path in [*paths, *find_licenses(source_folder)]:
        check_inside(source_folder, path)
        name = path.relative_to(source_folder)
        target = output_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(path, target)
        names.append(name.as_posix())
    return tuple(names)


def find_licenses(folder: Path) -> list[Path]:
    """Return the license files of ``folder``, however their names are cased."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix != ".py"
        and any(fnmatchcase(path.name.upper(), name) for name in LICENSE_FILES)
    )


def _copy(path: Path, target: Path) -> None:
    if path.suffix == ".json":
        content = read_json(path.parent, path.name)
        if content.pop("auto_map", None) is not None:
            target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return
    shutil.copyfile(path, target)


def read_report(folder: Path, name: str) -> dict[str, Any]:
    """Read the report of a conversion or a training.

    Raises:
        CheckpointError: absent, not a JSON object, or of a format that a newer transmla writes.
    """
    report = read_json(folder, name)
    written = report.get("format_version", 1)
    if not isinstance(written, int) or written > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / name} has format_version {written!r:.20}, and this transmla reads up to {FORMAT_VERSION}: "
            "upgrade transmla."
        )
    return report
