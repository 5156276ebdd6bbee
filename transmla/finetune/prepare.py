"""Everything about a training that can fail before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainingArguments

from transmla.checkpoint.publish import check_output
from transmla.checkpoint.source import Source
from transmla.checkpoint.stamps import file_stamp, model_digest
from transmla.config import FinetuneRequest
from transmla.data.text import load_tokenizer
from transmla.data.vocabulary import SharedTokens, share_tokens
from transmla.errors import UsageError
from transmla.finetune.adapters import check_peft
from transmla.finetune.data.datasets import Data, load_data
from transmla.finetune.sources import open_checkpoint, open_teacher
from transmla.modeling.load import is_quantizable, read_config
from transmla.old_names import renamed


@dataclass(frozen=True)
class Prepared:
    """The models and the data of a training.

    Attributes:
        shared: the tokens that the teacher speaks of, where those are not all of both models.
    """

    request: FinetuneRequest
    converted: Source
    config: PreTrainedConfig
    teacher: Source | None
    data: Data
    shared: SharedTokens | None = None

    @property
    def num_taught(self) -> int:
        """Return how many tokens a teacher speaks of."""
        return self.config.vocab_size if self.shared is None else len(self.shared)

    @property
    def notice(self) -> str | None:
        """Return what is to be said before the training."""
        if self.teacher is None or self.shared is None:
            return None
        shared = self.shared
        return (
            f"The teacher {self.teacher.name} has {shared.num_there:,} embeddings and {self.converted.name} "
            f"{shared.num_here:,}: it teaches over the {len(shared):,} tokens that they share, whose probabilities "
            "are renormalized."
        )

    def identity(self, arguments: TrainingArguments) -> dict[str, Any]:
        """Return what must be the same for the work of an interrupted run to be of use, by names that people know."""
        request = self.request.model_dump(mode="json", exclude={"output_dir", "report_to"})
        return {FinetuneRequest.spell(field): value for field, value in request.items()} | {
            "weights": model_digest(self.converted.folder),
            "weights of the teacher": None if self.teacher is None else model_digest(self.teacher.folder),
            "tokens shared with the teacher": None if self.teacher is None else self.num_taught,
            "tokens": self.data.sha256,
            # Of a stream that digest is about the start.
            **(_stamps(self.request.dataset) if self.request.streaming else {}),
            "number of processes": arguments.world_size,
            "bfloat16": arguments.bf16,
        }


def renamed_facts(identity: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """Give the facts that an interrupted run of an earlier release noted the names and words of this one."""
    if not isinstance(identity, dict):
        return identity
    fields = {FinetuneRequest.spell(field): field for field in FinetuneRequest.model_fields}
    asked = renamed("FinetuneRequest", {fields.get(name, name): value for name, value in identity.items()})
    # What there was none of.
    asked = {"repeats": 0.0, "hard_label_share": 0.0} | asked
    return {FinetuneRequest.spell(name) if name in fields.values() else name: value for name, value in asked.items()}


def _stamps(datasets: Iterable[str]) -> dict[str, str]:
    """Return what tells each file of some data sets from one that has taken its place."""
    files = [path for path in (Path(name).expanduser() for name in datasets) if path.is_file()]
    return {str(path): "{0} bytes, of {1}, {3}".format(*file_stamp(path)) for path in files}


def prepare(request: FinetuneRequest, *, overwrite: bool = False) -> Prepared:
    """Find the models and read the data.

    Raises:
        TransMLAError: the request cannot be carried out.
    """
    if request.streaming and request.max_steps is None:
        raise UsageError("--streaming needs --max-steps: nobody knows where the data will end.")
    if request.streaming and request.teacher_top_k:
        raise UsageError("--teacher-top-k has the teacher read all data before; with --streaming it is read meanwhile.")
    if request.attention_weight and request.teacher_top_k:
        raise UsageError("--attention-weight needs the teacher at every step: drop --teacher-top-k.")
    if request.train == "lora":
        check_peft()
    converted, config = open_checkpoint(request)
    check_output(request.output_dir, source_folder=converted.folder, overwrite=overwrite)
    if request.window > config.max_position_embeddings:
        raise UsageError(
            f"--window {request.window} is longer than the model's context of {config.max_position_embeddings}."
        )
    if request.latent_norm == "fitted" and is_quantizable(config):
        raise UsageError(
            f"--latent-norm fitted is for the portable profile, and {converted.name} was converted with --profile "
            "quantizable, which survives 8-bit blocks as it is."
        )
    teacher, tokenizer = open_teacher(request, converted), load_tokenizer(converted)
    shared = None
    if teacher is not None:
        shared = share_tokens(
            tokenizer,
            load_tokenizer(teacher),
            num_here=config.vocab_size,
            num_there=read_config(teacher).vocab_size,
            who=f"The teacher {teacher.name}",
            advice="only a model with the same tokens can teach; name one with --teacher",
        )
    data = load_data(request, tokenizer, vocab_size=config.vocab_size)
    return Prepared(request, converted, config, teacher, data, None if shared is None or shared.are_all else shared)
