"""Which columns of a data set are read: the text, or a chat, whatever else stands beside it.

They are chosen once, by what they are called and by what a thousand rows hold, never by the first row alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from transmla.data.chats import CHAT_COLUMNS, beside
from transmla.data.rows import Row, Rows
from transmla.errors import DataError, listed

_LOOKED_AT = 1000
_TEXT = "text"


@dataclass(frozen=True)
class Columns:
    """What is read of each row.

    Attributes:
        read: the column of the text, or those of a chat, or of a text and how it goes on.
        chat: whether they make a chat.
        beside: columns that a chat is laid out with.
        unread: all others.
        watched: those that have held nothing so far, where the one that is read is the only one with text; if they
            do hold text later, it is not clear which is the text.
    """

    read: tuple[str, ...]
    chat: bool
    beside: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    watched: tuple[str, ...] | None = None

    @property
    def is_found(self) -> bool:
        """Whether the text was found by what the rows hold, and not by a name."""
        return self.watched is not None


def choose_columns(rows: Rows, wanted: str | None, *, template: bool) -> Columns:
    """Choose the columns to read: the one that is wanted, a chat, ``text``, or the only one with text.

    Args:
        rows: of the data set.
        wanted: a column that is asked for.
        template: whether chats can be laid out; where they cannot, and there is text, it is the text that is read.

    Raises:
        DataError: the data set has no rows, or it is not clear which column holds the text.
    """
    with closing(rows.read()) as some:
        looked = list(islice(some, _LOOKED_AT))
    if not looked:
        raise DataError(f"{rows.dataset} holds no rows: pass a data set that does.")
    names = tuple(rows.columns or dict.fromkeys(name for row in looked for name in row.values))
    if wanted is not None:
        if wanted not in names:
            raise DataError(
                f"{rows.dataset} has no column {wanted!r}: pass --text-column, one of {listed(names, most=20)}."
            )
        return _chat(names, (wanted,)) if _is_chat(wanted, looked) else _text(names, wanted)
    chat = next((known for known in CHAT_COLUMNS if all(_holds(name, looked) for name in known)), None)
    strings = [name for name in names if any(isinstance(row.values.get(name), str) for row in looked)]
    if chat and (template or _TEXT not in strings):
        # Without a template, a prompt and what completes it are a text all the same.
        return _chat(names, chat) if template or len(chat) == 1 else _text(names, *chat)
    if _TEXT in names:
        return _text(names, _TEXT)
    if len(strings) == 1:
        empty = (name for name in names if any(name in row.values for row in looked) and not _holds(name, looked))
        return replace(_text(names, strings[0]), watched=tuple(empty))
    if not strings:
        raise DataError(f"{rows.dataset} has no column with text or chats; its columns: {listed(names, most=20)}.")
    raise DataError(f"{rows.dataset} has no column {_TEXT!r}: pass --text-column, one of {listed(strings, most=20)}.")


def _chat(names: Sequence[str], read: tuple[str, ...]) -> Columns:
    with_it = beside([name for name in names if name not in read])
    return Columns(read, True, with_it, tuple(name for name in names if name not in (*read, *with_it)))


def _text(names: Sequence[str], *read: str) -> Columns:
    return Columns(read, False, (), tuple(name for name in names if name not in read))


def _holds(name: str, looked: Sequence[Row]) -> bool:
    return any(row.values.get(name) is not None for row in looked)


def _is_chat(name: str, looked: Sequence[Row]) -> bool:
    """Return whether a column holds lists, or texts that are lists of messages in JSON."""
    known = any(name in columns for columns in CHAT_COLUMNS if len(columns) == 1)
    return any(
        isinstance(value, list) or (known and isinstance(value, str) and _is_json_list(value))
        for row in looked
        if (value := row.values.get(name)) is not None
    )


def _is_json_list(value: str) -> bool:
    try:
        found: Any = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list)
