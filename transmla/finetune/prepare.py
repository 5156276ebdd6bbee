"""Everything about a training that can fail before a weight is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from transmla.calibration.text import load_tokenizer
from transmla.checkpoint.publish import check_output
from transmla.checkpoint.source import Source
from transmla.config import FinetuneRequest
from transmla.errors import UsageError
from transmla.finetune.adapters import check_peft
from transmla.finetune.data import Data, load_data
from transmla.finetune.source import open_checkpoint, open_teacher
from transmla.modeling.load import is_quantizable


@dataclass(frozen=True)
class Prepared:
    """The models and the data of a training."""

    request: FinetuneRequest
    converted: Source
    config: PreTrainedConfig
    teacher: Source | None
    data: Data

    @property
    def identity(self) -> str:
        """Say what the work of an interrupted run must belong to, to be of use."""
        request = self.request.model_copy(update={"output_dir": Path(), "report_to": ()})
        weights = sorted((p.name, p.stat().st_size) for p in self.converted.folder.glob("*.safetensors"))
        return hashlib.sha256(f"{request.to_yaml()}{weights}{self.data.sha256}".encode()).hexdigest()


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
    if request.latent_norm == "live" and is_quantizable(config):
        raise UsageError(
            f"--latent-norm live is for the portable profile, and {converted.name} was converted with --profile "
            "quantizable, which survives 8-bit blocks as it is."
        )
    teacher = open_teacher(request, converted, config)
    data = load_data(request, load_tokenizer(converted), vocab_size=config.vocab_size)
    return Prepared(request, converted, config, teacher, data)
