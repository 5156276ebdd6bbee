"""Log-probabilities of a window's tokens in bounded memory.

Idea: the logits of a window are ``window * vocabulary`` numbers, by far the largest tensor of an evaluation, yet each
position is needed once. So the decoder runs once, and the head on a few positions at a time; two models that are
compared step through the same positions together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from transmla.modeling.head import model_head

CHUNK_NUMBERS = 2**24
"""Logits that may exist at once for one model: 64 MB in float32."""


@dataclass(frozen=True)
class PairScores:
    """What two models say about the same positions."""

    source_nll: Float[Tensor, "windows predicted"]
    converted_nll: Float[Tensor, "windows predicted"]
    kl: Float[Tensor, "windows predicted"]
    agrees: Bool[Tensor, "windows predicted"]


def token_nll(
    model: PreTrainedModel, tokens: Int[Tensor, "windows window"], *, chunk: int | None = None
) -> Float[Tensor, "windows predicted"]:
    """Return ``-log p(token | the window so far)`` in nats for every token but a window's first.

    ``chunk`` positions have their logits at once; by default as many as make 64 MB.
    """
    pieces = log_probabilities(model, tokens, chunk=chunk)
    return _as_windows([_nll(logprobs, targets) for logprobs, targets in pieces], tokens)


def pair_scores(
    source: PreTrainedModel,
    converted: PreTrainedModel,
    tokens: Int[Tensor, "windows window"],
    *,
    chunk: int | None = None,
) -> PairScores:
    """Return both losses, ``KL(source || converted)`` in nats and whether the likeliest token is the same one.

    ``chunk`` positions have their logits at once in each model; by default as many as make 64 MB.
    """
    source_nll, converted_nll, kl, agrees = [], [], [], []
    steps = zip(
        log_probabilities(source, tokens, chunk=chunk), log_probabilities(converted, tokens, chunk=chunk), strict=True
    )
    for (p, targets), (q, _) in steps:
        source_nll.append(_nll(p, targets))
        converted_nll.append(_nll(q, targets))
        kl.append((p.exp() * (p - q)).sum(-1))
        agrees.append(p.argmax(-1) == q.argmax(-1))
    return PairScores(*(_as_windows(parts, tokens) for parts in (source_nll, converted_nll, kl, agrees)))


def log_probabilities(
    model: PreTrainedModel, tokens: Int[Tensor, "windows window"], *, chunk: int | None = None
) -> Iterator[tuple[Float[Tensor, "positions vocab"], Int[Tensor, " positions"]]]:
    """Yield float32 log-probabilities with the tokens that do come next, window after window."""
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    hidden, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    head = model_head(model)
    chunk = chunk or max(1, CHUNK_NUMBERS // model.config.vocab_size)
    for rows, row_targets in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        yield head(rows).float().log_softmax(-1), row_targets


def _nll(logprobs: Float[Tensor, "positions vocab"], targets: Int[Tensor, " positions"]) -> Float[Tensor, " positions"]:
    return -logprobs.gather(-1, targets[:, None]).squeeze(-1)


def _as_windows(parts: list[Tensor], tokens: Int[Tensor, "windows window"]) -> Tensor:
    return torch.cat(parts).view(len(tokens), -1)
