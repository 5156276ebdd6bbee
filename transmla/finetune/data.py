"""What is learnt, and what is held out from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from transformers import PreTrainedTokenizerBase

from transmla.config import FinetuneRequest
from transmla.errors import DataError
from transmla.finetune.documents import read_documents
from transmla.finetune.packing import PackedDataset, Row, StreamedDataset, pack


@dataclass(frozen=True)
class Data:
    """Sequences of both kinds.

    Attributes:
        train: what is learnt.
        heldout: what is not, but measured.
        sha256: of all tokens, or of the held-out ones where the rest is streamed.
    """

    train: PackedDataset | StreamedDataset
    heldout: PackedDataset
    sha256: str


@dataclass(frozen=True)
class _Packed:
    """A data set that can be read from its start as often as one likes."""

    dataset: str
    request: FinetuneRequest
    tokenizer: PreTrainedTokenizerBase
    skip: int = 0

    def __iter__(self) -> Iterator[Row]:
        documents = read_documents(self.dataset, self.tokenizer, text_column=self.request.text_column)
        pad = next(t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if t is not None)
        return islice(pack(documents, window=self.request.window, pad_token=pad), self.skip, None)


def load_data(request: FinetuneRequest, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> Data:
    """Read, tokenise and pack the data; the first sequences of each data set are held out.

    Raises:
        DataError: it cannot be read, holds too little, or has tokens that the model does not know.
    """
    heldout, train = [], []
    for number, dataset in enumerate(request.eval_dataset or request.dataset):
        share = len(range(number, request.num_eval_windows, len(request.eval_dataset or request.dataset)))
        part = list(islice(_Packed(dataset, request, tokenizer), share))
        if len(part) < share:
            raise DataError(
                f"{dataset} has {len(part)} sequences of {request.window} tokens; {share} are to be held out: pass "
                "more text, or lower --num-eval-windows / --window."
            )
        heldout.append(part)
    for number, dataset in enumerate(request.dataset):
        skip = 0 if request.eval_dataset else len(heldout[number])
        train.append(_Packed(dataset, request, tokenizer, skip))
    held = PackedDataset(chain.from_iterable(heldout))
    digest = hashlib.sha256(held.tokens.numpy().tobytes())
    if request.streaming:
        learnt: PackedDataset | StreamedDataset = StreamedDataset(train, seed=request.seed)
        first = next(iter(train[0]), None)
        largest = 0 if first is None else max(first.tokens)
        empty = first is None
    else:
        learnt = PackedDataset(chain.from_iterable(train), first_index=len(held))
        empty = not len(learnt)
        if not empty:
            digest.update(learnt.tokens.numpy().tobytes())
            largest = int(learnt.tokens.max())
    if empty:
        raise DataError(
            f"Nothing is left to learn from {', '.join(request.dataset)} once {request.num_eval_windows} sequences of "
            f"{request.window} tokens are held out: pass more text, or lower --num-eval-windows / --window."
        )
    if (most := max(largest, int(held.tokens.max()))) >= vocab_size:
        raise DataError(f"The tokenizer gives token {most}, but the model has only {vocab_size} embeddings.")
    return Data(learnt, held, digest.hexdigest())
