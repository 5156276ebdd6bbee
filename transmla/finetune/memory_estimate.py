"""How much memory a training takes on each device, before anything is loaded.

Weights, gradients and the optimizer's state are counted. What the layers keep for the backward pass depends on the code
of Transformers and on what is trained, so the code is run: on fake tensors, which have sizes and no memory, one layer
and then two, for the difference is what each layer adds. Fused attention is taken for granted, and fused AdamW.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedConfig

from transmla.arch.skeleton import empty_matrices_are_fine
from transmla.config import Train
from transmla.finetune.distill.loss import CHUNK_NUMBERS, CPU_CHUNK_NUMBERS
from transmla.finetune.parameters import choose_trained, take_types
from transmla.finetune.report import Memory
from transmla.modeling.absorption import absorb, has_latent_attention

_FULL, _HALF = 4, 2
# Of student and teacher: logits, logarithms of probabilities, and a gradient.
_TENSORS_OF_A_CHUNK = 5
# The student's over the shared tokens, and their gradient.
_RENORMALIZED = 2
# A layer that is computed again, with the gradients of what it keeps.
_BACKWARD = 1.4


@dataclass(frozen=True)
class Setting:
    """What memory depends on, besides the model.

    Attributes:
        train: attention, all or lora.
        lora_rank: of lora.
        batch_size: sequences at once.
        window: tokens of each.
        bf16: products in bfloat16; what is not trained is held in it.
        checkpointing: only the inputs of layers are kept.
        on_cpu: smaller chunks of logits.
        renormalized: the teacher speaks of some of the tokens only.
    """

    train: Train
    lora_rank: int
    batch_size: int
    window: int
    bf16: bool
    checkpointing: bool
    on_cpu: bool
    renormalized: bool = False


def estimate_memory(config: PreTrainedConfig, setting: Setting, *, teacher_bytes: int = 0) -> Memory:
    """Return what one device needs.

    Args:
        config: of the model that is trained.
        setting: how.
        teacher_bytes: weights of the teacher, where it is on the same device.
    """
    one, two = (_count(config, setting, layers) for layers in (1, 2))
    layers = config.num_hidden_layers

    def total(name: str) -> int:
        first, both = getattr(one, name), getattr(two, name)
        return first + (layers - 1) * (both - first)

    tokens = setting.batch_size * setting.window
    width = _HALF if setting.bf16 else _FULL
    one_state = tokens * config.hidden_size * width
    chunk_numbers = CPU_CHUNK_NUMBERS if setting.on_cpu else CHUNK_NUMBERS
    # The hidden states after the last norm, those that count among them, and their gradient.
    tensors = _TENSORS_OF_A_CHUNK + (_RENORMALIZED if setting.renormalized else 0)
    head = 3 * one_state + tensors * _FULL * min(chunk_numbers, tokens * config.vocab_size)
    if setting.checkpointing:
        activations, recomputed = layers * one_state + head, round(_BACKWARD * (two.activations - one.activations))
        recomputed += layers * one_state
    else:
        activations, recomputed = total("activations") + head, 0
    trained = total("num_trained")
    return Memory(
        num_trained=trained,
        frozen=(total("num_parameters") - trained) * width,
        trained=trained * _FULL,
        optimizer=2 * trained * _FULL,
        gradients=trained * _FULL,
        activations=activations,
        recomputed=recomputed,
        teacher=teacher_bytes,
    )


@dataclass(frozen=True)
class _Counts:
    num_parameters: int
    num_trained: int
    activations: int


def _count(config: PreTrainedConfig, setting: Setting, layers: int) -> _Counts:
    """Run the decoder with so many of the last kind of layers."""
    config, depth = type(config).from_dict(copy.deepcopy(config.to_dict())), config.num_hidden_layers
    config.num_hidden_layers = layers
    if (dense := getattr(config, "first_k_dense_replace", None)) is not None:
        config.first_k_dense_replace = layers if dense >= depth else 0
    if "rope_type" in (getattr(config, "rope_parameters", None) or {}):
        # Frequencies take no memory, and some depend on positions, which fake tensors do not have.
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"), empty_matrices_are_fine():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        choose_trained(model, setting.train, lora_rank=setting.lora_rank, lora_alpha=setting.lora_rank)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = (absorb(model) if has_latent_attention(model) else model).to_empty(device="cpu").train()
        take_types(model, halved=setting.bf16)
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        tokens = torch.zeros(setting.batch_size, setting.window, dtype=torch.int64)
        cast = torch.autocast("cpu", torch.bfloat16) if setting.bf16 else nullcontext()
        with saved_tensors_hooks(keep, lambda tensor: tensor), cast:
            output = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        activations = sum(size for storage, size in kept.items() if storage not in parameters)
        del output
    return _Counts(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        activations=activations,
    )
