"""Coverage-guided fuzzing of what parses files from elsewhere, for some minutes, by hand.

    pip install atheris
    python -m tests.faults.fuzz header -max_total_time=120

Targets: header (of a weight file), index (of a checkpoint), config, recipe, journal. Whatever is found is a bug: the
parsers raise
the package's own errors and nothing else.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["transmla", "json", "yaml"], enable_loader_override=False):
    from transmla.arch.spec import describe, load_config
    from transmla.checkpoint.journal import Journal
    from transmla.checkpoint.reader import CheckpointReader
    from transmla.checkpoint.safetensors import read_headers
    from transmla.config import read_recipe
    from transmla.errors import TransMLAError

SCRATCH = Path(tempfile.mkdtemp())
HEADER = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"__metadata__":{"format":"pt"}}'
INDEX = b'{"metadata":{"total_size":24},"weight_map":{"a":"model-00001-of-00002.safetensors"}}'
CONFIG = (
    b'{"model_type":"llama","hidden_size":48,"num_attention_heads":6,"num_key_value_heads":2,"head_dim":16,'
    b'"num_hidden_layers":2,"intermediate_size":80,"vocab_size":401,"rms_norm_eps":1e-5,'
    b'"rope_parameters":{"rope_type":"llama3","rope_theta":10000.0,"factor":8.0}}'
)
RECIPE = b"model: a\noutput_dir: b\nkv_ratio: 0.5\nengine: [vllm, mlx]\n"
JOURNAL = b'{"identity": "a"}\n{"layer": 0, "freq_fold": null}\n'


def header(data: bytes) -> None:
    """Fuzz the JSON of a header, of the length that it says, with some weights behind."""
    path = SCRATCH / "model.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(24))
    for entry in read_headers(path).values():
        assert entry.offset + entry.nbytes <= path.stat().st_size


def index(data: bytes) -> None:
    """Fuzz the index beside one true shard."""
    folder = SCRATCH / "index"
    folder.mkdir(exist_ok=True)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + bytes(24))
    (folder / "model.safetensors.index.json").write_bytes(data)
    for entry in CheckpointReader(folder).headers.values():
        assert (folder / entry.file).resolve().parent == folder.resolve()


def config(data: bytes) -> None:
    """Fuzz a config."""
    (SCRATCH / "config.json").write_bytes(data)
    describe(load_config(SCRATCH))


def recipe(data: bytes) -> None:
    """Fuzz a recipe."""
    (SCRATCH / "recipe.yaml").write_bytes(data)
    read_recipe(SCRATCH / "recipe.yaml")


def journal(data: bytes) -> None:
    """Fuzz what an interrupted run has left."""
    (SCRATCH / "journal.jsonl").write_bytes(data)
    Journal(SCRATCH / "journal.jsonl")


TARGETS: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    "header": (header, HEADER),
    "index": (index, INDEX),
    "config": (config, CONFIG),
    "recipe": (recipe, RECIPE),
    "journal": (journal, JOURNAL),
}


def main() -> None:
    """Fuzz the target that is named first; what follows goes to libFuzzer."""
    target, seed = TARGETS[sys.argv.pop(1)]
    corpus = SCRATCH / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed)

    def once(data: bytes) -> None:
        with suppress(TransMLAError):
            target(data)

    atheris.Setup([*sys.argv, str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
