"""One message of a chat: from the forms that data sets have to the one that ``apply_chat_template`` takes.

That is ``role`` and ``content``, a text, and ``tool_calls`` with arguments that are objects. Other keys of a message
are left as they are, for a template may read them (``name``, ``tool_call_id``, ``reasoning_content`` …).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any

from transmla.errors import DataError

ASSISTANT = "assistant"
# Keys under which a message holds what the assistant thought before it spoke.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")

_CALL = "function_call"
# What the speakers are called in data sets, ShareGPT's above all.
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys((ASSISTANT, "gpt", "chatgpt", "model", "bard", "bing", _CALL), ASSISTANT),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
}
# Under ``role``, names that templates may know as their own stay.
_SHAREGPT_ONLY = {"observation"}
_END_OF_THOUGHT = "</think>"


def parse_json(value: Any, what: str, kind: type | UnionType, needed: str) -> Any:
    """Return a value that may be written as JSON in a string.

    Args:
        value: the value, or its JSON.
        what: what it is, for the message, as the start of a sentence.
        kind: the type that it is to have.
        needed: that type in words.

    Raises:
        DataError: it is no JSON, or of another type.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{what} holds text that is not JSON: {needed} is needed.") from None
    if not isinstance(value, kind):
        raise DataError(f"{what} holds {name_of_type(value)}: {needed} is needed.")
    return value


def name_of_type(value: Any) -> str:
    """Return what a value is, in the words of JSON."""
    if value is None:
        return "null"
    names = {Mapping: "an object", list | tuple: "a list", bool: "a boolean", int | float: "a number", str: "text"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


def read_message(value: Any, what: str) -> tuple[dict[str, Any], bool]:
    """Return a message as templates take it, and whether it is to be learnt if the assistant says it.

    Args:
        value: the message, or its JSON.
        what: which one it is, for error messages, as the start of a sentence.

    Raises:
        DataError: it has no role or content, or one that is not known.
    """
    found = parse_json(value, what, Mapping, "a message with role and content")
    # A key without a value is no key: so transformers has it, and templates ask for the key.
    message = {key: item for key, item in found.items() if item is not None}
    learnt = _learnt(message, what)
    key = next((key for key in ("role", "from") if key in message), None)
    if key is None:
        raise DataError(f"{what} has no role: a message needs role and content, or from and value.")
    speaker = message.pop(key)
    role = _role(speaker, what, known_only=key == "from")
    content = message.pop("content" if "content" in message else "value", None)
    calls = _tool_calls(message, what) if role == ASSISTANT else []
    if speaker.strip().lower() == _CALL and not calls:
        content, calls = _function_call(content, what)
    thoughts = {key: message[key] for key in THOUGHTS if key in message}
    for key, thought in thoughts.items():
        if not isinstance(thought, str):
            raise DataError(f"{what} holds {name_of_type(thought)} as {key}: text is needed.")
    if content is None and not calls and not any(thoughts.values()):
        raise DataError(f"{what} has no content.")
    text = "" if content is None else _text(content, what, result=role == "tool")
    read = {"role": role, "content": text, **message}
    return ({**read, "tool_calls": calls} if calls else read), learnt


def _role(speaker: Any, what: str, *, known_only: bool) -> str:
    if not isinstance(speaker, str):
        raise DataError(f"{what} holds {name_of_type(speaker)} as role: text is needed.")
    name = speaker.strip().lower()
    if name in _ROLES and (known_only or name not in _SHAREGPT_ONLY):
        return _ROLES[name]
    if known_only:
        raise DataError(f"{what} is from {speaker!r}: known are {', '.join(_ROLES)}.")
    return speaker


def _learnt(message: dict[str, Any], what: str) -> bool:
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise DataError(f"{what} has weight {weight!r}: only 0 and 1 are known.")
    if not isinstance(train, bool):
        raise DataError(f"{what} has train {train!r}: only true and false are known.")
    return bool(weight) and train


def _text(content: Any, what: str, *, result: bool) -> str:
    if isinstance(content, str):
        return content
    parts = isinstance(content, list) and all(isinstance(part, str | Mapping) for part in content)
    # What a tool gives back may be any value; a template is to have it as text.
    if result and not (parts and all(isinstance(part, str) or "type" in part for part in content)):
        return json.dumps(content, ensure_ascii=False)
    if not parts:
        raise DataError(f"{what} holds {name_of_type(content)} as content: text is needed.")
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    for part, text in zip(content, texts, strict=True):
        kind = "text" if isinstance(part, str) else part.get("type", "text")
        if kind != "text":
            raise DataError(f"{what} has a part of type {kind!r} in its content: only text can be read.")
        if not isinstance(text, str):
            raise DataError(f"{what} has a part without text in its content.")
    return "".join(texts)


def _tool_calls(message: dict[str, Any], what: str) -> list[dict[str, Any]]:
    # An empty list is no call: templates that ask for the key would take the message for one.
    calls = message.pop("tool_calls", None) or []
    # What OpenAI had before tool_calls.
    if (single := message.pop(_CALL, None)) is not None and not calls:
        calls = [single]
    calls = parse_json(calls, f"{what}, tool_calls,", list, "a list of calls")
    return [_tool_call(call, what) for call in calls]


def _tool_call(value: Any, what: str) -> dict[str, Any]:
    call = parse_json(value, f"{what}, tool call,", Mapping, "an object with name and arguments")
    given = call.get("function")
    around = {} if given is None else {key: item for key, item in call.items() if item is not None}
    function = dict(call if given is None else parse_json(given, f"{what}, tool call,", Mapping, "a function"))
    if given is None:
        around = {key: function.pop(key) for key in ("id",) if function.get(key) is not None}
        function = {key: item for key, item in function.items() if key not in ("id", "type", "function")}
    if not isinstance(function.get("name"), str):
        raise DataError(f"{what} has a tool call without the name of a function.")
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    arguments = parse_json(arguments, f"{what}, arguments of {function['name']},", Mapping, "an object")
    return {"type": "function", **around, "function": {**function, "arguments": dict(arguments)}}


def _function_call(content: Any, what: str) -> tuple[str, list[dict[str, Any]]]:
    # ShareGPT's form: the call, or several, as JSON where other messages have their text; a thought may precede it.
    thought, end, call = content.rpartition(_END_OF_THOUGHT) if isinstance(content, str) else ("", "", content)
    found = parse_json(call, what, Mapping | list, "a function call, an object with name and arguments,")
    return thought + end, [_tool_call(one, what) for one in (found if isinstance(found, list) else [found])]
