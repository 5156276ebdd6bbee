"""What a model says about every judged token of a text, alone or beside its source, in bounded memory.

The logits of a window are its tokens times the vocabulary, by far the largest tensor of an evaluation, yet each
position's are needed once. So the decoder runs once, and the head on a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from transmla.data.vocabulary import SharedTokens
from transmla.errors import CheckpointError
from transmla.evaluate.windows import ScoredWindows
from transmla.modeling.lm_head import model_head

CHUNK_NUMBERS = 2**24
"""Logits that may exist at once for one model: 64 MB in float32."""
TOP = 5


@dataclass(frozen=True)
class Reference:
    """The source, as far as a comparison needs it.

    Attributes:
        head: makes logits of hidden states.
        states: hidden states of all judged tokens; where they lie does not matter.
        shared: the tokens that both models have, where those are not all.
    """

    head: Callable[[Tensor], Tensor]
    states: Float[Tensor, "positions hidden"]
    shared: SharedTokens | None = None

    def compare(self, rows: Float[Tensor, "rows hidden"], q: Float[Tensor, "rows vocab"]) -> dict[str, Tensor]:
        """Compare the source, by its hidden states, with what another model says, by its log-probabilities."""
        p = _logprobs(self.head, rows)
        if self.shared is not None and not self.shared.are_all:
            p, q = (self.shared.pick(logprobs).log_softmax(-1) for logprobs in (p, q))
        return _compare(p, q)


def _ignore(windows: int) -> None:
    pass


@torch.inference_mode()
def score_tokens(
    model: PreTrainedModel,
    windows: ScoredWindows,
    *,
    batch_size: int = 1,
    chunk: int | None = None,
    reference: Reference | None = None,
    keep: Float[Tensor, "positions hidden"] | None = None,
    advance: Callable[[int], None] = _ignore,
) -> dict[str, numpy.ndarray]:
    """Judge every token that is to be judged.

    Args:
        model: the model.
        windows: the text.
        batch_size: windows at once, where neighbors are of one length.
        chunk: positions that have logits at once; by default as many as make 64 MB.
        reference: the source.
        keep: takes the hidden states.
        advance: is called with the number of windows just done.

    Returns:
        ``nll``: ``-log p(token | the window so far)``, in nats; ``right``: whether the token is the likeliest one.
        With a reference also ``kl``: KL(source || model), in nats; ``top1``: whether both hold the same token for the
        likeliest; ``top5``: the share of the source's five likeliest tokens that are among the model's.

    Raises:
        CheckpointError: a loss is not finite.
    """
    head, chunk = model_head(model), chunk or max(1, CHUNK_NUMBERS // model.config.vocab_size)
    found: dict[str, list[Tensor]] = {}
    done = 0
    for batch, first in windows.batches(batch_size):
        tokens = batch.to(model.device)
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        hidden, targets = hidden[:, first - 1 : -1].flatten(0, 1), tokens[:, first:].flatten()
        if keep is not None:
            keep[done : done + len(hidden)] = hidden.cpu()
        for start in range(0, len(hidden), chunk):
            logprobs, wanted = _logprobs(head, hidden[start : start + chunk]), targets[start : start + chunk]
            scores = {"nll": _finite(_nll(logprobs, wanted), model), "right": logprobs.argmax(-1) == wanted}
            if reference is not None:
                rows = reference.states[done + start : done + start + len(logprobs)].to(model.device)
                scores |= reference.compare(rows, logprobs)
            for name, values in scores.items():
                found.setdefault(name, []).append(values.cpu())
        done += len(hidden)
        advance(len(batch))
    return {name: torch.cat(values).numpy() for name, values in found.items()}


def _logprobs(head: Callable[[Tensor], Tensor], hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
    return head(hidden).float().log_softmax(-1)


def _nll(logprobs: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return -logprobs.gather(-1, targets[:, None]).squeeze(-1)


def _compare(p: Float[Tensor, "rows vocab"], q: Float[Tensor, "rows vocab"]) -> dict[str, Tensor]:
    top = min(TOP, p.shape[-1])
    theirs, ours = p.topk(top).indices, q.topk(top).indices
    shared = (theirs[:, :, None] == ours[:, None, :]).any(-1)
    return {
        "kl": (p.exp() * (p - q)).sum(-1),
        "top1": theirs[:, 0] == ours[:, 0],
        "top5": shared.float().mean(-1),
    }


def _finite(nll: Float[Tensor, " rows"], model: PreTrainedModel) -> Float[Tensor, " rows"]:
    if nll.isfinite().all():
        return nll
    dtype = str(model.dtype).removeprefix("torch.")
    raise CheckpointError(
        f"The loss of {model.name_or_path} is not finite in {dtype}: "
        + ("its weights are damaged." if model.dtype == torch.float32 else "try --dtype float32.")
    )
