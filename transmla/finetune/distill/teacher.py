"""Who the student learns from: the source model itself, or what of its logits was written down once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from transmla.data.vocabulary import SharedTokens
from transmla.modeling.lm_head import model_head


@dataclass(frozen=True)
class TeacherOutputs:
    """What a teacher says about one batch.

    Attributes:
        targets: about the tokens that come next, at the positions that count.
        attention: what each layer's attention puts out, if that is to be matched.
    """

    targets: FullTargets | TopTargets
    attention: tuple[Float[Tensor, "batch window hidden"], ...] = ()


class Teacher:
    """A model that says what it thinks of each batch; it is not trained, and may be on another device."""

    def __init__(
        self, model: PreTrainedModel, *, match_attention: bool = False, shared: SharedTokens | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head, self.shared = model_head(model), shared
        self._recorder = AttentionRecorder(model) if match_attention else None

    @property
    def stream_eps(self) -> float:
        """Return eps of the norms, by which residual streams of different scale are told."""
        return self.model.config.get_text_config().rms_norm_eps

    @torch.no_grad()
    def read(
        self,
        input_ids: Int[Tensor, "batch window"],
        position_ids: Int[Tensor, "batch window"],
        counted: Bool[Tensor, "batch window-1"],
    ) -> FullTargets:
        """Read a batch; ``counted`` marks the positions whose next token is to be learnt."""
        device = self.model.device
        hidden = self.model.get_decoder()(
            input_ids=input_ids.to(device), position_ids=position_ids.to(device), use_cache=False
        ).last_hidden_state
        return FullTargets(hidden[:, :-1][counted.to(device)], self.head, input_ids.device, self.shared)

    def teach(
        self,
        input_ids: Int[Tensor, "batch window"],
        position_ids: Int[Tensor, "batch window"],
        counted: Bool[Tensor, "batch window-1"],
    ) -> TeacherOutputs:
        """Return what there is to learn from a batch."""
        targets = self.read(input_ids, position_ids, counted)
        attention = self._recorder.take() if self._recorder else ()
        return TeacherOutputs(targets, tuple(output.to(input_ids.device) for output in attention))


@dataclass(frozen=True)
class FullTargets:
    """Every probability, computed from the teacher's hidden states when a chunk of positions needs them.

    ``shared`` are the tokens that it is about, where those are not all.
    """

    hidden: Float[Tensor, "positions hidden"]
    head: Callable[[Tensor], Tensor]
    device: torch.device
    shared: SharedTokens | None = None

    def divergence(
        self, student: Float[Tensor, "positions vocab"], rows: slice, temperature: float
    ) -> Float[Tensor, " positions"]:
        """Return KL(teacher || student), at each of ``rows``."""
        teacher = self._logprobs(rows, temperature)
        if self.shared is not None:
            student = self.shared.pick(student).log_softmax(-1)
        probability = teacher.exp()
        # A product of matrices makes no third one of that size.
        return torch.einsum("pv,pv->p", probability, teacher - student)

    def entropies(self, chunk: int) -> Float[Tensor, " positions"]:
        """Return the entropy at all positions."""
        starts = range(0, len(self.hidden), chunk)
        return torch.cat([_entropy(self._logprobs(slice(start, start + chunk), 1.0)) for start in starts])

    def top(
        self, rows: slice, count: int, temperature: float
    ) -> tuple[Float[Tensor, "positions top"], Int[Tensor, "positions top"]]:
        """Return the largest probabilities' logarithms, and their tokens."""
        logprobs, places = self._logprobs(rows, temperature).topk(count)
        return logprobs, places if self.shared is None else self.shared.numbers_of(places)

    @torch.no_grad()
    def _logprobs(self, rows: slice, temperature: float) -> Float[Tensor, "positions shared"]:
        logits = self.head(self.hidden[rows])
        logits = (logits if self.shared is None else self.shared.pick(logits)).to(self.device).float()
        return (logits / temperature if temperature != 1 else logits).log_softmax(-1)


@dataclass(frozen=True)
class TopTargets:
    """The largest probabilities, and one number for all the others together.

    ``shared`` are the tokens that it is about, where those are not all.
    """

    logprobs: Float[Tensor, "positions top"]
    tokens: Int[Tensor, "positions top"]
    shared: SharedTokens | None = None

    def divergence(
        self, student: Float[Tensor, "positions vocab"], rows: slice, temperature: float
    ) -> Float[Tensor, " positions"]:
        """Return the divergence between both distributions over the top tokens and the rest, at each of ``rows``.

        It is never larger than that over all tokens. ``logprobs`` are of the same temperature.
        """
        top = self.logprobs[rows].float()
        same = student.gather(-1, self.tokens[rows].long())
        if self.shared is not None:
            same = same - self.shared.pick(student).logsumexp(-1, keepdim=True)
        rest, student_rest = _log_rest(top), _log_rest(same)
        return (top.exp() * (top - same)).sum(-1) + rest.exp() * (rest - student_rest)

    def entropies(self, chunk: int) -> Float[Tensor, " positions"]:
        """Return the entropy at all positions, with all other tokens taken for one."""
        top = self.logprobs.float()
        return _entropy(torch.cat([top, _log_rest(top).unsqueeze(-1)], dim=-1))


def _entropy(logprobs: Float[Tensor, "positions tokens"]) -> Float[Tensor, " positions"]:
    return -torch.einsum("pv,pv->p", logprobs.exp(), logprobs)


def _log_rest(logprobs: Float[Tensor, "positions top"]) -> Float[Tensor, " positions"]:
    """Return the logarithm of what some probabilities leave of one, which rounding must not make negative."""
    return torch.log1p(-logprobs.exp().sum(-1).clamp_max(1 - 1e-6))


class AttentionRecorder:
    """Notes what each layer's attention puts out."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._outputs: list[Tensor] = []
        for layer in model.get_decoder().layers:
            layer.self_attn.register_forward_hook(lambda module, given, output: self._outputs.append(output[0]))

    def take(self) -> tuple[Tensor, ...]:
        """Return what has been noted since the last time."""
        outputs, self._outputs = tuple(self._outputs), []
        return outputs
