"""Where a source model comes from: a folder, the hub, or a GGUF file; in the end always a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transmla.checkpoint.contents import check_no_adapter, no_weights
from transmla.checkpoint.gguf import stage_gguf
from transmla.checkpoint.hub import DESCRIPTION_FILES, WEIGHT_FILES, download, fetch_headers
from transmla.checkpoint.model_files import LICENSE_FILES
from transmla.checkpoint.reader import CheckpointReader
from transmla.checkpoint.safe_paths import read_json
from transmla.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, TensorHeader
from transmla.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Source:
    """A source model whose files are at hand.

    Attributes:
        name: What the user typed.
        folder: Folder with config.json and, if asked for, the weights.
        repo_id: Hub id without a revision; ``None`` for a local model.
        revision: Commit of a hub model.
    """

    name: str
    folder: Path
    repo_id: str | None = None
    revision: str | None = None


def open_source(
    model: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    weights: bool = True,
) -> Source:
    """Find a model and fetch what is needed of it.

    Args:
        model: Folder, hub id, or hub id@revision; a folder wins over a hub id of the same spelling.
        gguf_file: Name of a GGUF file of ``model``; it is dequantised first, even without ``weights``, because only
            the dequantised model has a config and headers.
        revision: Branch, tag or commit of a hub model.
        token: Hub token.
        weights: Fetch and require safetensors weights; without, ``remote_headers`` tells their shapes.

    Raises:
        UsageError: revisions that contradict each other, or one for a local folder.
        CheckpointError: no such model, not a model, an adapter, or one without weights that are safe to read.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        if revision is not None:
            raise UsageError(f"--revision applies to models on the hub; {model} is a folder here.")
        source = Source(model, local)
    else:
        source = _open_hub(model, revision, token, _patterns(gguf_file, weights))
    check_no_adapter(model, source.folder)
    if gguf_file is not None:
        return Source(model, stage_gguf(source.folder, gguf_file), source.repo_id, source.revision)
    _check_model_folder(source)
    if weights and not any((source.folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(no_weights(model, source.folder))
    return source


def remote_headers(source: Source, *, token: str | None = None) -> Mapping[str, TensorHeader]:
    """Return the headers of the weights: from the folder if they are there, else from the hub, without the weights.

    Raises:
        CheckpointError: weights that are absent, incomplete or out of reach.
    """
    if source.repo_id is None:
        return CheckpointReader(source.folder).headers
    try:
        return CheckpointReader(source.folder).headers
    except CheckpointError:
        return fetch_headers(source.repo_id, revision=source.revision, token=token)


def _patterns(gguf_file: str | None, weights: bool) -> tuple[str, ...]:
    if gguf_file is not None:
        return (gguf_file, *LICENSE_FILES)
    return (*DESCRIPTION_FILES, *WEIGHT_FILES) if weights else DESCRIPTION_FILES


def _open_hub(model: str, revision: str | None, token: str | None, patterns: tuple[str, ...]) -> Source:
    path = Path(model).expanduser()
    if path.is_file():
        raise CheckpointError(
            f"{model} is a file; give its folder as MODEL and --gguf-file {path.name}."
            if path.suffix == ".gguf"
            else f"{model} is a file; MODEL must be a folder with config.json or a hub id."
        )
    if "://" in model:  # not repeated in the message: it may carry a password or a token
        raise CheckpointError("MODEL is a URL; give the hub id instead, such as org/name.")
    repo_id, _, pinned = model.partition("@")
    if model.startswith((".", "/", "~", "\\")) or repo_id.count("/") > 1:
        raise CheckpointError(f"There is no folder {model}, and it is not a hub id such as org/name.")
    if pinned and revision is not None and revision != pinned:
        raise UsageError(f"{model} names the revision {pinned}, but --revision is {revision}; give one of them.")
    folder = download(repo_id, revision=pinned or revision, token=token, patterns=patterns)
    return Source(model, folder, repo_id, folder.name)


def _check_model_folder(source: Source) -> None:
    if (source.folder / "config.json").is_file():
        read_json(source.folder, "config.json")
        return
    ggufs = sorted(path.name for path in source.folder.glob("*.gguf"))
    hint = f" It holds {ggufs[0]}: choose it with --gguf-file {ggufs[0]}." if ggufs else ""
    raise CheckpointError(f"{source.name} is not a model folder: it has no config.json.{hint}")
