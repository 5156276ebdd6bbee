"""Checkpoints of holes: a published config.json, headers as the model's are, and no byte of weights.

A case is added by dropping its config into ``configs/`` and a line into ``TRUTH.tsv``; where the stored tensors differ
from those of the model's class, lines of ``TENSORS.tsv`` say how.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from transmla.arch.families import FAMILIES
from transmla.arch.skeleton import Skeleton
from transmla.arch.spec import load_config, read_raw_config
from transmla.arch.weight_names import stored_shapes
from transmla.checkpoint.safetensors import SINGLE_FILE, TensorHeader
from transmla.errors import TransMLAError

HERE = Path(__file__).parent
_SPELLINGS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


class Truth(NamedTuple):
    """What is right for one model: ``converts``, ``within N`` tokens, or ``refused`` with words of the true reason."""

    name: str
    verdict: str
    words: tuple[str, ...]


def truths() -> list[Truth]:
    return [
        Truth(name, verdict, tuple(filter(None, words.split("|")))) for name, verdict, words, _ in rows("TRUTH.tsv")
    ]


def rows(table: str) -> Iterator[list[str]]:
    for line in (HERE / table).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield line.split("\t")


def build(name: str, folder: Path) -> Path:
    """Write the checkpoint ``name`` and return its folder."""
    folder.mkdir()
    shutil.copyfile(HERE / "configs" / f"{name}.json", folder / "config.json")
    tensors = class_tensors(folder)
    for model, what, which, how in rows("TENSORS.tsv"):
        if model != name:
            continue
        if what == "beside":
            (folder / which).write_text("{}")
        elif what == "added":
            spelling, *shape = how.split()
            tensors[which] = (spelling, tuple(map(int, shape)))
        elif what == "absent":
            tensors = {key: tensor for key, tensor in tensors.items() if not re.search(which, key)}
        elif what == "renamed":
            tensors = {re.sub(which, how, key): tensor for key, tensor in tensors.items()}
        else:
            tensors = dict(replaced(tensors, which, how))
    write_holes(folder / SINGLE_FILE, tensors)
    return folder


def class_tensors(folder: Path) -> Tensors:
    """What the class of a supported family stores; of others a few tensors, as nobody looks at them."""
    raw = read_raw_config(folder)
    spelling = _SPELLINGS[raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"]
    try:
        config = load_config(folder)
    except TransMLAError:
        return {"model.embed_tokens.weight": (spelling, (8, 4)), "lm_head.weight": (spelling, (8, 4))}
    tied = config.tie_word_embeddings
    shapes = stored_shapes(Skeleton(config).shapes, FAMILIES[config.model_type], (), tied=tied)
    return {name: (spelling, tuple(shape)) for name, shape in shapes.items()}


def replaced(tensors: Tensors, which: str, how: str) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Put other tensors in the place of some: ``weight U8 rows/4 columns, weight_scale BF16 1``."""
    for name, (spelling, shape) in tensors.items():
        if not re.search(which, name):
            yield name, (spelling, shape)
            continue
        sizes = {"rows": shape[0], "columns": shape[-1]}
        for ending, kind, *axes in (part.split() for part in how.split(",")):
            yield name.removesuffix("weight") + ending, (kind, tuple(_size(axis, sizes) for axis in axes))


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    size, _, divisor = axis.partition("/")
    return sizes.get(size) or int(size) if not divisor else sizes[size] // int(divisor)


def write_holes(path: Path, tensors: Tensors) -> None:
    """Write a header, and as many bytes of nothing as it is of."""
    entries, end = {}, 0
    for name, (spelling, shape) in tensors.items():
        size = TensorHeader(name, shape, spelling, "", 0).nbytes
        entries[name] = {"dtype": spelling, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + end)
    assert math.isclose(path.stat().st_size, end, abs_tol=len(header) + 8)
