"""Does a model decode what it reads? Its first layers, token by token with a cache, against the whole text at once.

How a cache is filled and read is the work of libraries and of absorbed attention, whatever the weights: a release that
hands the cache over by another name makes every step forget the text, while a whole text at once is read as before.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from transmla.modeling import expand
from transmla.modeling.absorption import absorb, has_latent_attention
from transmla.modeling.kv_cache import cache_argument
from transmla.records import Record

LAYERS = 2
"""Layers that are loaded: enough for a cache to matter, few enough for a model of any depth."""
PROMPT, STEPS = 24, 8
"""Tokens that are read at once, and then one by one."""
SAME = 1e-3
"""How far logits in float32 may be off, in standard deviations: a hundred times what is found."""
NOISE = 10
"""Times as far as the first token alone may be off without a cache: that is rounding, which a degenerate model can make
any difference of."""


class DecodingReport(Record):
    """The largest difference of a logit from those without a cache, in their standard deviations.

    Attributes:
        cached: decoded as stock transformers does.
        absorbed: decoded on the latents; ``None`` for a model without any.
        rounding: of the first token alone, for which there is nothing to cache.
    """

    cached: float
    absorbed: float | None = None
    rounding: float

    @property
    def passed(self) -> bool:
        """Whether each form decodes what it reads."""
        limit = max(SAME, NOISE * self.rounding)
        return all(found <= limit for found in (self.cached, self.absorbed) if found is not None)

    def summary(self) -> str:
        """Return a sentence for people, without its full stop."""
        found = f"with a cache logits differ by {self.cached:.1e} standard deviations from those without"
        return found if self.absorbed is None else f"{found}, absorbed by {self.absorbed:.1e}"


@torch.inference_mode()
def check_decoding(model: PreTrainedModel, *, seed: int = 0) -> DecodingReport:
    """Decode random tokens in each form that a model has; it is left expanded."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size, context = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
    length = min(PROMPT + STEPS, context or PROMPT + STEPS)
    tokens = torch.randint(vocab_size, (1, length), generator=generator).to(model.device)
    expand(model)
    wanted = model(input_ids=tokens, use_cache=False).logits.float()
    start = max(1, length - STEPS)
    # As a step of decoding has it, a product of a matrix and a vector, which rounds otherwise.
    alone = model(input_ids=tokens[:, :1], use_cache=False).logits.float()
    rounding, cached = _off(wanted[:, :1], alone), _off(wanted, _decoded(model, tokens, start))
    if not has_latent_attention(model):
        return DecodingReport(cached=cached, rounding=rounding)
    absorbed = _off(wanted, _decoded(absorb(model), tokens, start))
    expand(model)
    return DecodingReport(cached=cached, absorbed=absorbed, rounding=rounding)


def _decoded(model: PreTrainedModel, tokens: Int[Tensor, "1 tokens"], start: int) -> Float[Tensor, "1 tokens vocab"]:
    """Return the logits of a text whose tokens come one by one from ``start`` on."""
    cache = DynamicCache(config=model.config)
    pieces = [tokens[:, :start], *tokens[:, start:].split(1, 1)]
    return torch.cat(
        [model(input_ids=piece, use_cache=True, **{cache_argument(model): cache}).logits.float() for piece in pieces], 1
    )


def _off(wanted: Tensor, found: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.std()).nan_to_num(torch.inf).item()
