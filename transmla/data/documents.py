"""A data set as documents: texts, or chats that are laid out as text, and what became of each row.

A text file is one document. The rows of a data set are one each, and where they are joined to one text, it is as GPTQ
and the papers after it join WikiText: by an empty line, empty rows kept. Chats follow each other as they are laid out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from transmla.data.chats import Chat, read_chat, read_plain, without_filled
from transmla.data.columns import Columns, choose_columns
from transmla.data.formats import READ_ERRORS, open_bytes, unreadable
from transmla.data.layout import Laid, laid_out
from transmla.data.messages import name_of_type
from transmla.data.rows import Row, open_rows
from transmla.data.tokens import check_characters
from transmla.data.unread import unread_by_template
from transmla.errors import DataError, listed

PIECE_CHARACTERS = 100_000
SEPARATOR = "\n\n"

T = TypeVar("T")


class Document(NamedTuple):
    """What one row holds.

    Attributes:
        place: where it stands, as in "Line 7 of data.jsonl".
        content: a text; a chat that has not been laid out; or a prompt with what completes it, where there is no chat
            template to lay them out.
    """

    place: str
    content: str | Chat | Laid


@dataclass
class Reading:
    """What was read of a data set, counted while it is read.

    Attributes:
        dataset: as the user calls it.
        columns: those that are read; none of a text file.
        unread_columns: the others.
        unread_by_template: what stands beside chats and the chat template does not read.
        is_found: the column is read because it is the only one with text, whatever it is called.
        num_rows: rows that were read so far.
        num_without_text: those among them that hold nothing, for the column is null or absent; an empty text is a text.
        num_without_answer: chats in which there is nothing of the assistant to learn, where that is looked for.
    """

    dataset: str
    columns: tuple[str, ...] = ()
    unread_columns: tuple[str, ...] = ()
    unread_by_template: tuple[str, ...] = ()
    is_found: bool = False
    num_rows: int = 0
    num_without_text: int = 0
    num_without_answer: int = 0

    def sentence(self) -> str | None:
        """Return what should be known of a data set that was not read as a whole, if anything."""
        told = []
        if self.num_without_text:
            nothing = f"{self.num_without_text:,} of {self.num_rows:,} rows"
            told.append(f"{nothing} hold nothing in {', '.join(self.columns)}")
        if self.num_without_answer:
            nothing = f"{self.num_without_answer:,} of {self.num_rows:,} conversations"
            told.append(f"{nothing} have no answer of the assistant to learn, and are left out")
        if self.is_found:
            told.append(f"the text is taken from {self.columns[0]!r}, the only column with text")
        if self.unread_columns:
            told.append(f"the columns {listed(self.unread_columns, most=8)} are not read")
        if self.unread_by_template:
            told.append(f"the chat template does not read {listed(self.unread_by_template, most=8)}")
        return f"{self.dataset}: {'; '.join(told)}." if told else None


class Documents:
    """The documents of a data set, in order; each time from the start.

    Attributes:
        reading: what is known of the last time.
    """

    def __init__(
        self, dataset: str, *, text_column: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Open a data set, and look at its first rows.

        Args:
            dataset: file, or hub data set ``name[:config[:split]]``.
            text_column: column of the text or the chat; found by itself when there is one.
            tokenizer: lays out chats.

        Raises:
            DataError: it cannot be read, or has no column to take the text from.
        """
        self.dataset, self._tokenizer = dataset, tokenizer
        self.reading = Reading(dataset)
        self._rows = open_rows(dataset)
        if self._rows is not None:
            template = tokenizer is not None and bool(tokenizer.chat_template)
            self._columns = choose_columns(self._rows, text_column, template=template)

    @property
    def is_text(self) -> bool:
        """Whether the data set is one text, and has no rows."""
        return self._rows is None

    @property
    def are_chats(self) -> bool:
        """Whether the rows hold chats."""
        return not self.is_text and self._columns.chat

    @property
    def have_answers(self) -> bool:
        """Whether a part of each row is an answer: of a chat, or of a prompt and what completes it."""
        return not self.is_text and (self._columns.chat or len(self._columns.read) > 1)

    def __iter__(self) -> Iterator[Document]:
        """Yield a document for each row that holds one, or a text file as a whole."""
        if self._rows is None:
            yield Document(self.dataset, "".join(self.pieces()))
            return
        columns = self._columns
        read = (*columns.read, *columns.beside)
        self.reading = reading = Reading(self.dataset, read, columns.unread, is_found=columns.is_found)
        roles: set[tuple[str, bool]] = set()
        for row in self._rows.read((*read, *(columns.watched or ()))):
            reading.num_rows += 1
            # Rows of JSON have what they have, the thousandth as the first.
            known = {*read, *reading.unread_columns}
            reading.unread_columns += tuple(name for name in row.values if name not in known)
            content = at(row.place, _content, row, columns)
            if content is None:
                reading.num_without_text += 1
                continue
            if isinstance(content, Chat) and self._tokenizer is not None:
                unread = unread_by_template(content, self._tokenizer, roles)
                reading.unread_by_template += tuple(name for name in unread if name not in reading.unread_by_template)
            yield Document(row.place, content)

    def texts(self) -> Iterator[str]:
        """Yield the documents as texts, chats laid out by the tokenizer's template.

        Raises:
            DataError: a chat that cannot be laid out; which row.
        """
        for place, content in self:
            if isinstance(content, Chat):
                yield at(place, laid_out, content, self._tokenizer)
            else:
                yield content if isinstance(content, str) else content.text

    def pieces(self) -> Iterator[str]:
        """Yield pieces of text; joined as they are, they make the whole text."""
        if self.is_text:
            self.reading = Reading(self.dataset)
            yield from read_text(Path(self.dataset).expanduser())
            return
        separator = ""
        for text in self.texts():
            yield separator + text
            separator = "" if self._columns.chat else SEPARATOR


def at(place: str, function: Callable[..., T], *arguments: object) -> T:
    """Call a function about a row; what is wrong with it is said with the row's place in front."""
    try:
        return function(*arguments)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _content(row: Row, columns: Columns) -> str | Chat | Laid | None:
    if columns.is_found:
        _check_only_text(row, columns)
    values = [row.values.get(name) for name in columns.read]
    if all(value is None for value in values):
        return None
    if columns.chat:
        return read_chat(without_filled(dict(row.values)) if row.filled else row.values, columns.read)
    if len(values) > 1:
        whole, completion = read_plain(row.values, columns.read)
        check_characters(whole)
        return Laid(whole, (completion,))
    [text] = values
    if not isinstance(text, str):
        raise DataError(f"Column {columns.read[0]!r} holds {name_of_type(text)}, not text.")
    check_characters(text)
    return text


def _check_only_text(row: Row, columns: Columns) -> None:
    [read] = columns.read
    other = next((name for name, value in row.values.items() if isinstance(value, str) and name != read), None)
    if other is not None:
        raise DataError(
            f"Column {other!r} holds text as well as {read!r}, which was the only one up to here: pass --text-column, "
            f"one of {read}, {other}."
        )


def open_documents(
    dataset: str, *, text_column: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[str]:
    """Open a data set as one text.

    The first text is read before this returns, so that what cannot be read fails before the work starts.

    Returns:
        Pieces of text; joined as they are, they make the whole text.

    Raises:
        DataError: nothing there, not readable, not text, or no column to take the text from.
    """
    return with_text(Documents(dataset, text_column=text_column, tokenizer=tokenizer))


def with_text(documents: Documents) -> Iterator[str]:
    """Return the pieces of a data set, as :func:`open_documents` does.

    Raises:
        DataError: it holds no text.
    """
    pieces, first = documents.pieces(), list[str]()
    for piece in pieces:
        first.append(piece)
        if piece.strip(SEPARATOR) or documents.is_text:
            return chain(first, pieces)
    raise DataError(f"{documents.dataset} holds no text: pass a data set that does.")


def read_text(path: Path) -> Iterator[str]:
    """Yield a text file piece by piece.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    # Read by length, not by line: a text may have no line ends at all.
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as file:  # type: ignore[type-var]
            while piece := file.read(PIECE_CHARACTERS):
                if "\0" in piece:
                    raise DataError(f"{path} is not a text file: it holds zero bytes.")
                yield piece
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it, or name another file.") from None
    except READ_ERRORS as error:
        raise unreadable(path, error) from None
