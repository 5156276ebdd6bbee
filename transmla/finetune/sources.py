"""Where the models of a training come from."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from transmla.checkpoint.model_files import RECIPE_FILE
from transmla.checkpoint.source import Source, open_source
from transmla.config import FinetuneRequest, read_recipe
from transmla.errors import CheckpointError, UsageError
from transmla.modeling.load import read_config

NO_TEACHER = "none"


def open_checkpoint(request: FinetuneRequest) -> tuple[Source, PreTrainedConfig]:
    """Find the model that is to be trained.

    Raises:
        CheckpointError: it is not there.
    """
    converted = open_source(request.checkpoint, token=request.token)
    return converted, read_config(converted, computed=False)


def open_teacher(request: FinetuneRequest, converted: Source) -> Source | None:
    """Find the model to learn from, the source that a conversion has recorded unless another one is named.

    Raises:
        TransMLAError: it is not there, or nothing is recorded.
    """
    if request.teacher == NO_TEACHER:
        if request.ce_weight not in (None, 1):
            raise UsageError(f"--teacher none leaves cross-entropy alone: drop --ce-weight {request.ce_weight:g}.")
        if request.attention_weight or request.teacher_top_k or request.hard_label_share:
            raise UsageError(
                "--attention-weight, --hard-label-share and --teacher-top-k need a teacher, and --teacher is none."
            )
        return None
    name, gguf_file, revision = request.teacher, request.gguf_file, request.revision
    recorded = name is None
    if name is None:
        name, gguf_file, revision = _recorded_source(converted)
    try:
        teacher = open_source(name, gguf_file=gguf_file, revision=revision, token=request.token)
    except CheckpointError as error:
        if not recorded:
            raise
        raise CheckpointError(
            f"The source that {converted.name} was converted from cannot be opened ({error}) Name a teacher with "
            "--teacher, or --teacher none for cross-entropy alone."
        ) from None
    return teacher


def _recorded_source(converted: Source) -> tuple[str, str | None, str | None]:
    path = converted.folder / RECIPE_FILE
    if not path.is_file():
        raise UsageError(
            f"{converted.name} does not say what it was converted from ({RECIPE_FILE} is missing): name the teacher "
            "with --teacher, or pass --teacher none."
        )
    recipe = read_recipe(Path(path))
    name, gguf_file, revision = (recipe.get(key) for key in ("model", "gguf_file", "revision"))
    if not isinstance(name, str) or not isinstance(gguf_file, str | None) or not isinstance(revision, str | None):
        raise CheckpointError(f"{path} does not name the model that was converted: name the teacher with --teacher.")
    return name, gguf_file, revision
