"""What is learnt, and what is held out from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import torch
from transformers import PreTrainedTokenizerBase

from transmla.config import FinetuneRequest
from transmla.data.documents import Documents, Reading
from transmla.data.synthetic import whole_words
from transmla.data.tokens import check_known, text_start
from transmla.errors import DataError
from transmla.finetune.data.documents import read_documents
from transmla.finetune.data.packing import Counts, PackedDataset, Row, StreamedDataset, pack
from transmla.finetune.data.repeats import Interleaved, RepeatRows

# Sequences of repeats by which copying is watched, as a share of the others that are held out.
_HELDOUT_REPEATS = 0.25


@dataclass(frozen=True)
class Data:
    """Sequences of both kinds.

    Attributes:
        train: what is learnt.
        heldout: what is not, but measured.
        heldout_repeats: repeats of what is held out, to watch copying by; ``None`` where there are to be none.
        told: sentences on what of the data is not learnt; of a stream nobody knows how much.
        sha256: of all tokens, or of the held-out ones where the rest is streamed.
    """

    train: PackedDataset | StreamedDataset
    heldout: PackedDataset
    sha256: str
    heldout_repeats: PackedDataset | None = None
    told: tuple[str, ...] = ()


@dataclass
class _Packed:
    """A data set that can be read from its start as often as one likes; what it counts is of the last whole time."""

    dataset: str
    request: FinetuneRequest
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    skip: int = 0
    counts: Counts = field(default_factory=Counts)
    reading: Reading = field(default_factory=lambda: Reading(""))
    have_answers: bool = False

    def __iter__(self) -> Iterator[Row]:
        request, counts = self.request, Counts()
        opened = Documents(self.dataset, text_column=request.text_column, tokenizer=self.tokenizer)
        self.have_answers = opened.have_answers
        documents = read_documents(opened, self.tokenizer, bos=request.bos)
        # A token for padding that was added to a tokenizer has no row in the model.
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(token for token in candidates if token is not None and token < self.vocab_size)
        start = [] if request.bos == "once" else text_start(self.tokenizer, request.bos)
        rows = pack(
            documents, window=request.window, pad_token=pad, start=start, overflow=request.overflow, counts=counts
        )
        for row in islice(rows, self.skip, None):
            self.reading = opened.reading
            # Of a stream, too, whose end is not read before the training.
            check_known(torch.tensor(row.tokens), vocab_size=self.vocab_size)
            yield row
        if opened.have_answers and not counts.num_learnable:
            raise DataError(
                f"{self.dataset} holds {opened.reading.num_rows:,} conversations, and in none of them is an answer "
                "of the assistant to learn."
            )
        # Once all of it has been read.
        self.counts, self.reading = counts, opened.reading

    def told(self) -> Iterator[str]:
        """Yield what should be known of a data set of which not everything is learnt, once it has been read."""
        counts = self.counts
        if counts.num_long:
            lost = f"{counts.num_lost:,} of {counts.num_learnable:,} tokens to be learnt are lost"
            cut = {
                "cut": f"their ends are cut, and {lost}: raise --window, or pass --overflow split",
                "drop": f"they are dropped, and {lost}",
                "split": "they go on in further sequences, which do not see what came before",
            }[self.request.overflow]
            yield (
                f"{self.dataset}: {counts.num_long:,} of {counts.num_chats:,} conversations are longer than --window "
                f"{self.request.window}; {cut}."
            )
        if (sentence := self.reading.sentence()) is not None:
            yield sentence

    def told_of_stream(self) -> Iterator[str]:
        """Yield what is known of a stream once its first sequence has been read: what becomes of rows, not of how many.

        They are read when they are learnt, by whichever worker comes to them.
        """
        if self.have_answers and self.request.overflow != "split":
            lost = {"cut": "is cut", "drop": "is left out"}[self.request.overflow]
            yield (
                f"{self.dataset} is streamed: a conversation longer than --window {self.request.window} {lost}, "
                "and nobody counts how many are: pass --overflow split, or leave --streaming out."
            )
        known = replace(self.reading, num_without_text=0, num_without_answer=0)
        if (sentence := known.sentence()) is not None:
            yield sentence

    def some(self) -> Iterator[Row]:
        """Yield the same.

        Raises:
            DataError: that is nothing.
        """
        rows = iter(self)
        if (first := next(rows, None)) is None:
            held = f" once {self.skip} sequences of {self.request.window} tokens are held out" if self.skip else ""
            raise DataError(
                f"Nothing is left to learn from {self.dataset}{held}: pass more text, lower --num-eval-windows / "
                "--window, or leave it out."
            )
        yield from chain([first], rows)


def load_data(request: FinetuneRequest, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> Data:
    """Read, tokenise and pack the data; the first sequences of each data set are held out.

    Raises:
        DataError: it cannot be read, holds too little, or has tokens that the model does not know.
    """
    heldout, train = [], []
    for number, dataset in enumerate(request.eval_dataset or request.dataset):
        share = len(range(number, request.num_eval_windows, len(request.eval_dataset or request.dataset)))
        part = list(islice(_Packed(dataset, request, tokenizer, vocab_size), share))
        if len(part) < share:
            raise DataError(
                f"{dataset} has {len(part)} sequences of {request.window} tokens; {share} are to be held out: pass "
                "more text, or lower --num-eval-windows / --window."
            )
        heldout.append(part)
    for number, dataset in enumerate(request.dataset):
        skip = 0 if request.eval_dataset else len(heldout[number])
        train.append(_Packed(dataset, request, tokenizer, vocab_size, skip))
    held_rows = list(chain.from_iterable(heldout))
    held = PackedDataset(held_rows)
    digest = hashlib.sha256(held.tokens.numpy().tobytes())
    repeats, judges = None, []
    if request.repeats:
        words = whole_words(tokenizer, vocab_size=vocab_size)
        start = [] if request.bos == "once" else text_start(tokenizer, request.bos)
        repeats = RepeatRows(words, share=request.repeats, start=start, seed=f"{request.seed} train")
        judges = RepeatRows(words, share=_HELDOUT_REPEATS, start=start, seed=f"{request.seed} heldout").of(held_rows)
    if request.streaming:
        for source in train:
            next(source.some())
        told = tuple(chain.from_iterable(source.told_of_stream() for source in train))
        sources = [
            Interleaved(source, repeats.seeded(number)) if repeats else source for number, source in enumerate(train)
        ]
        learnt: PackedDataset | StreamedDataset = StreamedDataset(sources, seed=request.seed)
        num_learnt = 0
    else:
        rows = chain.from_iterable(source.some() for source in train)
        learnt = PackedDataset(repeats.among(rows, last=True) if repeats else rows, first_index=len(held))
        digest.update(learnt.tokens.numpy().tobytes())
        told = tuple(chain.from_iterable(source.told() for source in train))
        num_learnt = len(learnt)
    heldout_repeats = PackedDataset(judges, first_index=len(held) + num_learnt) if judges else None
    return Data(learnt, held, digest.hexdigest(), heldout_repeats, told)
