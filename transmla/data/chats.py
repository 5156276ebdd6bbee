"""A row of a data set to a chat, whatever shape the row has: OpenAI's, ShareGPT's, or TRL's prompt and completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transmla.data.messages import ASSISTANT, name_of_type, parse_json, read_message
from transmla.errors import DataError

# The known columns, in the order of preference.
CHAT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("conversation",),
    ("prompt", "completion"),
)

TOOLS, _SYSTEM, OPTIONS = "tools", "system", "chat_template_kwargs"
_OWN_SYSTEM = {"system", "developer"}


@dataclass(frozen=True)
class Chat:
    """A conversation, as ``apply_chat_template`` takes it.

    Attributes:
        messages: role, content (text), and what else a template may read.
        tools: that the assistant may call, as JSON schemas of functions.
        options: further variables for the template.
        learnt: for each message, whether it is said by the assistant and to be learnt.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    learnt: Sequence[bool] = ()

    def __post_init__(self) -> None:
        if not self.learnt:
            object.__setattr__(self, "learnt", tuple(message.get("role") == ASSISTANT for message in self.messages))


def beside(columns: Sequence[str]) -> tuple[str, ...]:
    """Return those of a row's columns that are read together with a chat."""
    return tuple(column for column in (TOOLS, _SYSTEM, OPTIONS) if column in columns)


def read_chat(row: Mapping[str, Any], columns: Sequence[str]) -> Chat:
    """Return the chat that a row holds.

    Args:
        row: as it was read.
        columns: one of ``CHAT_COLUMNS``, or another column that holds messages.

    Raises:
        DataError: a sentence on what is not as a chat has it; the row is for the caller to name.
    """
    if len(columns) == 1:
        messages, learnt = _messages(row.get(columns[0]), columns[0])
    else:
        messages, learnt = _prompt_and_completion(row, *columns)
    system = row.get(_SYSTEM) if _SYSTEM not in columns else None
    if system is not None and not isinstance(system, str):
        raise DataError(f"Column {_SYSTEM!r} holds {name_of_type(system)}: text is needed.")
    if system:
        own = [message["content"] for message in messages if message["role"] in _OWN_SYSTEM]
        if own and system not in own:
            raise DataError(
                f"Column {_SYSTEM!r} holds another text than the chat's own system message: drop one of them."
            )
        if not own:
            messages, learnt = [{"role": "system", "content": system}, *messages], [False, *learnt]
    return Chat(messages, _tools(row.get(TOOLS)), _options(row.get(OPTIONS)), tuple(learnt))


def read_plain(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, tuple[int, int]]:
    """Return prompt and completion as one text, and where in it the completion is, for models without a chat template.

    Raises:
        DataError: they are no texts.
    """
    for column in columns:
        if not isinstance(row.get(column), str):
            raise DataError(
                f"Column {column!r} holds {name_of_type(row.get(column))}: without a chat template it must be text."
            )
    prompt, completion = (row[column] for column in columns)
    return prompt + completion, (len(prompt), len(prompt) + len(completion))


def without_filled(value: Any) -> Any:
    """Return a value without the keys that are null, however deep: Arrow gives every object the keys of all others."""
    if isinstance(value, Mapping):
        return {key: without_filled(item) for key, item in value.items() if item is not None}
    return [without_filled(item) for item in value] if isinstance(value, list) else value


def _messages(value: Any, column: str) -> tuple[list[dict[str, Any]], list[bool]]:
    what = f"Column {column!r}"
    found = value if isinstance(value, Mapping) else parse_json(value, what, list, "a list of messages")
    if isinstance(found, Mapping):
        found = _untransposed(found, what)
    if not found:
        raise DataError(f"{what} holds an empty list: a chat needs a message.")
    if isinstance(found[0], list | tuple):
        raise DataError(f"{what} holds a list of chats: each needs a row of its own.")
    if all(isinstance(one, str) and not one.lstrip().startswith("{") for one in found):
        raise DataError(f"{what} holds a list of texts, not of messages with role and content.")
    read = [read_message(one, f"Message {number} of column {column!r}") for number, one in enumerate(found, start=1)]
    messages = [message for message, _ in read]
    return messages, [message["role"] == ASSISTANT and learnt for message, learnt in read]


def _untransposed(found: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    # The data set library hands a sequence of objects over as an object of lists.
    lists = [value for value in found.values() if isinstance(value, list)]
    if len(lists) < len(found) or len({len(value) for value in lists}) != 1:
        raise DataError(f"{what} holds an object: a list of messages is needed.")
    return [dict(zip(found, values, strict=True)) for values in zip(*lists, strict=True)]


def _prompt_and_completion(row: Mapping[str, Any], *columns: str) -> tuple[list[dict[str, Any]], list[bool]]:
    messages: list[dict[str, Any]] = []
    learnt: list[bool] = []
    for column, role in zip(columns, ("user", ASSISTANT), strict=True):
        value = row.get(column)
        if isinstance(value, str) and not _is_list(value):
            value = [{"role": role, "content": value}]
        found, said = _messages(value, column)
        messages += found
        # What the assistant said in the prompt is given.
        learnt += said if role == ASSISTANT else [False] * len(found)
    return messages, learnt


def _is_list(text: str) -> bool:
    # Messages that were written as JSON; a text may begin with any bracket.
    if not text.lstrip().startswith("[{"):
        return False
    try:
        found = parse_json(text, "", list, "")
    except DataError:
        return False
    return all(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in found)


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if value is None or value == "":
        return None
    what = f"Column {TOOLS!r}"
    tools = [
        dict(parse_json(tool, what, Mapping, "a list of JSON schemas of functions"))
        for tool in parse_json(value, what, list, "a list of JSON schemas of functions")
    ]
    # As transformers writes them: a function without its wrapper is not found by templates that look into it.
    return [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool for tool in tools
    ] or None


def _options(value: Any) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    return dict(parse_json(value, f"Column {OPTIONS!r}", Mapping, "an object with variables for the chat template"))
