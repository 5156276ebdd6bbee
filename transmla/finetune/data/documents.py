"""Documents to learn from: tokens, and which of them are to be learnt.

A text file is one document. Of a data set with rows, each row is a document: a text, or a chat, laid out by the
tokenizer's chat template, of which only what the assistant says is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from transmla.config import Bos
from transmla.data.chats import Chat
from transmla.data.documents import Documents, at, with_text
from transmla.data.layout import Laid, encode, samples
from transmla.data.text import token_stream
from transmla.data.tokens import begun, encode_text, text_start


@dataclass(frozen=True)
class Document:
    """A text, a piece of a long one, or a conversation.

    Attributes:
        tokens: all of it.
        loss_mask: whether a token is to be predicted.
        whole: it is not to be cut in two to fill a window.
        document_start: it does not go on from the one before.
    """

    tokens: Sequence[int]
    loss_mask: Sequence[bool]
    whole: bool = False
    document_start: bool = True


def read_documents(
    dataset: str | Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str | None = None,
    bos: Bos = "auto",
) -> Iterator[Document]:
    """Yield the documents of a data set, in order.

    Args:
        dataset: file, or hub data set ``name[:config[:split]]``; or what has been opened already.
        tokenizer: of the model; for conversations with a chat template.
        text_column: column that holds the text or the chat; found by itself when there is one.
        bos: what a text begins with. Chats begin as their template lays them out, but for ``always``.

    Raises:
        DataError: it cannot be read, or holds neither text nor conversations; which row.
    """
    documents = dataset
    if not isinstance(documents, Documents):
        documents = Documents(documents, text_column=text_column, tokenizer=tokenizer)
    if documents.is_text:
        for number, tokens in enumerate(token_stream(with_text(documents), tokenizer)):
            piece = tokens if number else begun(tokens, text_start(tokenizer, bos))
            yield Document(piece, [True] * len(piece), document_start=number == 0)
        return
    for place, content in documents:
        if isinstance(content, Chat):
            found = at(place, _conversation, content, tokenizer, bos)
            documents.reading.num_without_answer += not found
            yield from found
        elif isinstance(content, Laid):
            yield _completed(content, tokenizer, bos)
        elif content:
            yield _text(content, tokenizer, bos)


def _text(text: str, tokenizer: PreTrainedTokenizerBase, bos: Bos) -> Document:
    tokens = _ended(encode_text(text, tokenizer, bos), tokenizer)
    return Document(tokens, [True] * len(tokens))


def _completed(laid: Laid, tokenizer: PreTrainedTokenizerBase, bos: Bos) -> Document:
    # As a text is, but that the prompt is given.
    tokens, loss_mask = encode(laid, tokenizer)
    whole = begun(tokens, text_start(tokenizer, bos))
    given = [False] * (len(whole) - len(tokens))
    ended = _ended(whole, tokenizer)
    return Document(ended, [*given, *loss_mask, *[True] * (len(ended) - len(whole))], whole=True)


def _ended(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # As the model is used to it: with the token that ends a text, as with the one that begins it.
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _conversation(chat: Chat, tokenizer: PreTrainedTokenizerBase, bos: Bos) -> list[Document]:
    start = text_start(tokenizer, bos) if bos == "always" else []
    found = []
    for laid in samples(chat, tokenizer):
        tokens, loss_mask = encode(laid, tokenizer)
        whole = begun(tokens, start)
        found.append(Document(whole, [False] * (len(whole) - len(tokens)) + loss_mask, whole=True))
    return found
