"""Chats: how far are the converted models from their source where it answers?

Questions are laid out by the tokenizer's chat template, and the source answers them greedily. Each converted model
reads question and answer, and at every token of the answer its distribution is compared with the source's: on the
source's own path, and so without the chance of two texts that have gone apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy
import torch

from transmla.config import EvalRequest
from transmla.data.questions import QUESTIONS
from transmla.data.template import open_template
from transmla.data.tokens import begun, check_known
from transmla.data.vocabulary import SharedTokens
from transmla.errors import UsageError
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.paired_scores import PairedScores
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.parts.greedy import write_greedily
from transmla.evaluate.report.text_table import Shown, TextTable, percent, small
from transmla.evaluate.result_cache import Arrays, ResultCache
from transmla.evaluate.windows import ScoredWindows
from transmla.generate.generation_config import read_settings
from transmla.generate.sampling import listed_ids
from transmla.modeling.load import read_config
from transmla.progress import Progress
from transmla.records import Record

LONGEST_QUESTION = 384
"""Tokens of a question as the template lays it out, at most."""


class ChatScore(Record):
    """What a model says of the source's answers, by token: ``nll`` and ``kl`` in nats.

    ``agreement`` is the share of tokens at which the same one is the likeliest for both; this and ``kl`` are ``None``
    for the source itself.
    """

    model: str
    nll: float
    kl: float | None = None
    agreement: float | None = None


class ChatReport(Record):
    """Questions that the source has answered.

    Its answers have ``num_positions`` tokens, ``num_new_tokens`` each at most; ``num_ended`` of them came to their end.
    """

    num_prompts: int
    num_new_tokens: int
    num_positions: int
    num_ended: int
    scores: tuple[ChatScore, ...]


class ChatPart(Part):
    """What all models say of the source's answers."""

    name = "chat"
    record = ChatReport
    flags = ("--chat-prompts",)
    compares = True

    @classmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return whether there are questions."""
        return bool(request.chat_prompts)

    @classmethod
    def check(cls, request: EvalRequest) -> None:
        """Refuse more questions than there are, and a source alone.

        Raises:
            UsageError: which flag would do.
        """
        if request.chat_prompts > len(QUESTIONS):
            raise UsageError(
                f"There are {len(QUESTIONS)} questions, but --chat-prompts is {request.chat_prompts}: lower it."
            )
        super().check(request)

    @classmethod
    def longest(cls, request: EvalRequest) -> tuple[int, str]:
        """Return a question with its answer."""
        return LONGEST_QUESTION + request.greedy_tokens, "--greedy-tokens"

    @classmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield one part."""
        request = setting.request
        heard = read_settings(setting.source.found, vocab_size=setting.vocab_size).heard
        yield cls(
            _lay_out(QUESTIONS[: request.chat_prompts], setting),
            ends=sorted({*listed_ids(heard.eos_token_id), *listed_ids(setting.tokenizer.eos_token_id)}),
            results=setting.cache,
            source=setting.source,
            shared=setting.shared,
            num_new_tokens=request.greedy_tokens,
            batch_size=request.batch_size,
        )

    @classmethod
    def tables(cls, records: Sequence[ChatReport], shown: Shown) -> Iterator[TextTable]:
        """Yield what models say of the answers."""
        for chat in records:
            rows = tuple(
                (name, small(score.nll), small(score.kl), percent(score.agreement))
                for name, score in zip(shown.names, chat.scores, strict=True)
            )
            title = f"The source's answers to {chat.num_prompts} questions, {chat.num_positions:,} tokens"
            yield TextTable(title, ("Model", "NLL", "KL", "Top-1"), rows)

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        ends: Sequence[int],
        results: ResultCache,
        source: LazyModel,
        shared: Mapping[str, SharedTokens],
        num_new_tokens: int,
        batch_size: int,
    ) -> None:
        """Take questions.

        Args:
            prompts: their tokens, up to where an answer begins.
            ends: tokens that end an answer.
            results: where what is known lies.
            source: that answers.
            shared: the tokens that each of the others, by its folder, shares with the source.
            num_new_tokens: of an answer, at most.
            batch_size: answers read at once.
        """
        self._prompts, self._ends, self._num_new_tokens = prompts, ends, num_new_tokens
        self._results, self._source, self._shared, self._batch_size = results, source, shared, batch_size
        self._written: Arrays = {}
        self._found: list[tuple[str, Arrays]] = []

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Have the source answer, and any model read that."""
        self._written = self._answers(progress)
        answers = numpy.split(self._written["tokens"], numpy.cumsum(self._written["lengths"])[:-1])
        texts = [torch.tensor([*prompt, *answer]) for prompt, answer in zip(self._prompts, answers, strict=True)]
        # A source may say what the rows of a padded vocabulary stand for, which is nothing.
        check_known(torch.cat(texts), vocab_size=read_config(lazy.found).vocab_size)
        scores = PairedScores(
            ScoredWindows(tuple(texts), tuple(map(len, self._prompts)), tokens_per_byte=1.0),
            what="reads the answers",
            results=self._results,
            source=self._source,
            shared=self._shared,
            batch_size=self._batch_size,
        )
        self._found.append((lazy.name, scores.of(lazy, progress)))

    def report(self) -> Iterator[ChatReport]:
        """Put everything together."""
        yield ChatReport(
            num_prompts=len(self._prompts),
            num_new_tokens=self._num_new_tokens,
            num_positions=int(self._written["lengths"].sum()),
            num_ended=int(self._written["ended"].sum()),
            scores=tuple(_score(name, scores) for name, scores in self._found),
        )

    def _answers(self, progress: Progress) -> Arrays:
        """Return the answers' tokens one after the other, their lengths, and whether each came to its end."""
        prompts, ends, count = [list(prompt) for prompt in self._prompts], self._ends, self._num_new_tokens
        key = {"what": "answers", **self._source.key, "prompts": prompts, "ends": ends, "new": count}

        def write() -> Arrays:
            answers = []
            with progress.task(f"{self._source.name} answers", len(prompts)) as advance:
                # One at a time: they have different lengths, and padding could change what is likeliest.
                for prompt in prompts:
                    written = write_greedily(
                        self._source.model, torch.tensor([prompt]), num_new_tokens=count, ends=ends
                    )
                    answers.append(written[0, len(prompt) :])
                    advance(1)
            return {
                "tokens": torch.cat(answers).numpy(),
                "lengths": numpy.array([len(answer) for answer in answers]),
                "ended": numpy.array([int(answer[-1]) in ends for answer in answers]),
            }

        return self._results.arrays(key, write)


def _lay_out(questions: Sequence[str], setting: Setting) -> list[list[int]]:
    """Return the tokens of questions as the chat template has them, up to where an answer begins.

    Raises:
        TransMLAError: there is no template, or it makes too much of a question.
    """
    tokenizer = setting.tokenizer
    if not tokenizer.chat_template:
        raise UsageError(
            f"--chat-prompts needs a chat template, and the tokenizer of {setting.source.name} has none: leave the "
            "flag out, or evaluate a model that was made for chats."
        )
    template = open_template(tokenizer, tools=None, options={})
    prompts = []
    for question in questions:
        text = template([{"role": "user", "content": question}], prompt=True)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        prompts.append(begun(tokens, list(setting.start)))
    longest = max(map(len, prompts))
    if longest > LONGEST_QUESTION:
        raise UsageError(
            f"A question has {longest} tokens with what the chat template of {setting.source.name} puts around it, and "
            f"--chat-prompts has room for {LONGEST_QUESTION}: leave the flag out."
        )
    check_known(torch.tensor([token for prompt in prompts for token in prompt]), vocab_size=setting.vocab_size)
    return prompts


def _score(name: str, scores: Arrays) -> ChatScore:
    nll = float(scores["nll"].mean(dtype=numpy.float64))
    if "kl" not in scores:
        return ChatScore(model=name, nll=nll)
    # A divergence is never negative, but the rounding of one that is zero may be.
    kl = max(0.0, float(scores["kl"].mean(dtype=numpy.float64)))
    return ChatScore(model=name, nll=nll, kl=kl, agreement=float(scores["top1"].mean()))
