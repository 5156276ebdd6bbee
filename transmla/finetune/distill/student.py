"""A model in training: it computes its own loss, so that whatever wraps a model wraps all of it.

Fully sharded or not, a module may use its weights only inside its own ``forward``; so the head is applied there, to a
few positions at a time, and what comes out is a loss and no logits.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from transmla.finetune.distill.loss import Mix, chunked_loss
from transmla.finetune.distill.teacher import AttentionRecorder, TeacherOutputs

IGNORE_INDEX = -100
"""The label of a token that is not to be learnt, as everywhere in Transformers."""


class Student(PreTrainedModel):
    """Comes before a causal language model of Transformers, and is another ``forward`` for it."""

    # The trainer then says over how many tokens, on all devices and in all accumulated batches, the mean is taken.
    accepts_loss_kwargs = True

    mix: Mix
    attention_weight: float
    stream: float
    recorder: AttentionRecorder | None

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, mix: Mix, *, attention_weight: float = 0.0, stream: float = 1.0
    ) -> Student:
        """Turn a loaded model, in place, into a student.

        Args:
            model: the model.
            mix: of the loss.
            attention_weight: weight of the mean relative error of the layers' attention outputs.
            stream: size of its residual stream as a multiple of the teacher's.
        """
        model.__class__ = type(cls.__name__, (cls, type(model)), {})
        assert isinstance(model, cls)
        model.mix, model.attention_weight, model.stream = mix, attention_weight, stream
        model.recorder = AttentionRecorder(model) if attention_weight else None
        return model

    def forward(
        self,
        input_ids: Int[Tensor, "batch window"] | None = None,
        position_ids: Int[Tensor, "batch window"] | None = None,
        labels: Int[Tensor, "batch window"] | None = None,
        teacher_outputs: TeacherOutputs | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> Any:
        """Return loss, nll and kl, each a mean over the tokens that count; without labels what the model puts out.

        ``num_items_in_batch`` is what the sums are divided by, where it is not the number of tokens here.
        """
        if labels is None:
            return super().forward(input_ids=input_ids, position_ids=position_ids, **others)
        hidden = self.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        next_token = labels[:, 1:]
        counted = next_token != IGNORE_INDEX
        sums = chunked_loss(
            hidden[:, :-1][counted],
            self.get_output_embeddings(),
            next_token[counted],
            teacher_outputs.targets if teacher_outputs else None,
            self.mix,
            lengths=counted.sum(-1).tolist(),
        )
        count = counted.sum() if num_items_in_batch is None else num_items_in_batch
        loss = sums.loss / count
        if self.recorder is not None and teacher_outputs is not None:
            # A mean over tokens like the others, of which this batch has its share.
            share = counted.sum() / count
            loss = loss + self.attention_weight * share * _mismatch(
                self.recorder.take(), teacher_outputs.attention, self.stream
            )
        return {"loss": loss, "nll": sums.nll / count, "kl": sums.kl / count}


def _mismatch(outputs: tuple[Tensor, ...], wanted: tuple[Tensor, ...], stream: float) -> Float[Tensor, ""]:
    """Return the squared error of attention outputs as a share of their square, mean over the layers."""
    errors = [
        (output.float() / stream - target.float()).square().sum() / target.float().square().sum()
        for output, target in zip(outputs, wanted, strict=True)
    ]
    return torch.stack(errors).mean()
