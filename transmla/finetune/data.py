"""What is learnt, and what is held out from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from transformers import PreTrainedTokenizerBase

from transmla.calibration.tokens import check_known
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
    vocab_size: int
    skip: int = 0

    def __iter__(self) -> Iterator[Row]:
        documents = read_documents(self.dataset, self.tokenizer, text_column=self.request.text_column)
        # A token for padding that was added to a tokenizer has no row in the model.
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(token for token in candidates if token is not None and token < self.vocab_size)
        for row in islice(pack(documents, window=self.request.window, pad_token=pad), self.skip, None):
            # Of a stream, too, whose end is not read before the training.
            check_known(torch.tensor(row.tokens), vocab_size=self.vocab_size)
            yield row


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
    held = PackedDataset(chain.from_iterable(heldout))
    digest = hashlib.sha256(held.tokens.numpy().tobytes())
    if request.streaming:
        learnt: PackedDataset | StreamedDataset = StreamedDataset(train, seed=request.seed)
        empty = next(iter(train[0]), None) is None
    else:
        learnt = PackedDataset(chain.from_iterable(train), first_index=len(held))
        empty = not len(learnt)
        if not empty:
            digest.update(learnt.tokens.numpy().tobytes())
    if empty:
        raise DataError(
            f"Nothing is left to learn from {', '.join(request.dataset)} once {request.num_eval_windows} sequences of "
            f"{request.window} tokens are held out: pass more text, or lower --num-eval-windows / --window."
        )
    return Data(learnt, held, digest.hexdigest())
