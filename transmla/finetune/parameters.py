"""Which weights are trained, and in which types all of them are held."""

from __future__ import annotations

from transformers import PreTrainedModel

from transmla.config import Train
from transmla.finetune.adapters import add_adapters


def choose_trained(model: PreTrainedModel, train: Train, *, lora_rank: int, lora_alpha: int) -> list[str]:
    """Freeze what is not trained, and return the names of what is: all weights, those of attention, or adapters."""
    if train == "lora":
        return add_adapters(model, rank=lora_rank, alpha=lora_alpha)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train == "all" or ".self_attn." in name)
        if parameter.requires_grad:
            trained.append(name)
    return trained


def take_types(model: PreTrainedModel, *, halved: bool) -> None:
    """Hold what is trained in float32; with ``halved`` the other matrices in bfloat16, as their products are."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif halved and parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
