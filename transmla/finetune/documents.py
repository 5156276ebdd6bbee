"""Data sets to documents: tokens, and which of them are to be learnt.

A text file is one document. Of a data set with rows, each row is a document: text, or a conversation, ``messages`` with
role and content, laid out by the tokenizer's chat template, of which only what the assistant says is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from transmla.calibration.rows import has_rows, open_rows
from transmla.calibration.text import choose_column, read_text, token_stream
from transmla.calibration.tokens import encode_text
from transmla.errors import DataError

_MESSAGES = "messages"


@dataclass(frozen=True)
class Document:
    """A text, a piece of a long one, or a conversation.

    Attributes:
        tokens: all of it.
        learnt: whether a token is to be predicted.
        whole: it is not to be cut in two to fill a window.
        begins: it does not go on from the one before.
    """

    tokens: Sequence[int]
    learnt: Sequence[bool]
    whole: bool = False
    begins: bool = True


def read_documents(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, text_column: str | None = None
) -> Iterator[Document]:
    """Yield the documents of a file or of a hub data set, in order.

    Args:
        dataset: text, JSONL, JSON or parquet file, or hub data set ``name[:config[:split]]``.
        tokenizer: of the model; for conversations with a chat template.
        text_column: column that holds the text or the messages; found by itself when there is one.

    Raises:
        DataError: it cannot be read, or holds neither text nor conversations.
    """
    if not has_rows(dataset):
        pieces = token_stream(read_text(Path(dataset).expanduser()), tokenizer)
        for number, tokens in enumerate(pieces):
            yield Document(tokens, [True] * len(tokens), begins=number == 0)
        return
    column = None
    for row in open_rows(dataset):
        if column is None:
            column = _MESSAGES if text_column is None and _MESSAGES in row else choose_column(dataset, row, text_column)
        content = row[column]
        if isinstance(content, str):
            if content:
                yield _text(content, tokenizer)
        elif isinstance(content, list):
            yield _conversation(content, tokenizer, dataset)
        elif content is not None:
            raise DataError(
                f"Column {column!r} of {dataset} holds {type(content).__name__}, neither text nor a list of messages."
            )


def _text(text: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    # As the model is used to it: with the token that begins a text where the tokenizer has one, and the one that ends.
    tokens = encode_text(text, tokenizer)
    if tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
        tokens = [*tokens, tokenizer.eos_token_id]
    return Document(tokens, [True] * len(tokens))


def _conversation(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, dataset: str) -> Document:
    if not tokenizer.chat_template:
        raise DataError(
            f"{dataset} holds conversations, but the tokenizer of the model has no chat template: pass text, with "
            "--text-column where there are several columns."
        )
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages):
        raise DataError(f"{dataset} has messages that are not of the form {{role, content}}.")
    try:
        spans = _assistant_spans(messages, tokenizer)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except DataError:
        raise
    # Templates are small programs, and refuse what they do not know as they please.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"The chat template does not take a conversation of {dataset}: {reason}") from None
    encoded = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    learnt = [any(start <= begin < stop for start, stop in spans) for begin, _ in encoded["offset_mapping"]]
    return Document(encoded["input_ids"], learnt, whole=True)


def _assistant_spans(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Return where, in characters of the laid out conversation, the assistant speaks, its end mark included."""

    def laid_out(count: int, **options: Any) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)

    whole = laid_out(len(messages))
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = laid_out(index, add_generation_prompt=True) if index else "", laid_out(index + 1)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                "The chat template lays out an earlier turn of a conversation differently once others follow, so that "
                "what the assistant says cannot be told apart: split such conversations, one for each answer."
            )
        spans.append((len(before), len(after)))
    return spans
