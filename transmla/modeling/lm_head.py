"""A model's head apart from its decoder, for logits of a few positions at a time.

The head is not only ``lm_head``: Granite divides the logits, Cohere multiplies them, Gemma caps them. All that lives in
the model's own ``forward``, which therefore runs here, in a shallow copy whose decoder hands through what it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from transmla.arch.arguments import refuse_arguments


def model_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return what the model makes of its decoder's output: hidden states to logits. The model stays as it is."""
    decoder = model.get_decoder()
    name = next(name for name, child in model.named_children() if child is decoder)
    headless = copy.copy(model)
    headless._modules = {**model._modules, name: _HandThrough()}

    def head(hidden: Float[Tensor, "positions hidden"]) -> Float[Tensor, "positions vocab"]:
        return headless(inputs_embeds=hidden[None], use_cache=False).logits[0]

    return head


class _HandThrough(nn.Module):
    # The kind of output that models with experts read more fields of; the others do not mind.
    def forward(self, *, inputs_embeds: Tensor, return_dict: Any = None, **others: Any) -> MoeModelOutputWithPast:
        refuse_arguments(others, "the decoder")
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
