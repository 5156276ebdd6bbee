"""Tool calls, as a template can lay them out.

Most templates want the arguments of a call as an object, some as JSON in a string; some take a message for a call only
if it has no content, not an empty one. A template that cannot write calls leaves them out, and a model would learn to
say nothing. So each form is tried with calls that cannot be overlooked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transmla.data.template import Template
from transmla.errors import DataError

# Words that no tool list and no conversation has.
_NAME, _KEY, _VALUE = "qzvcallx", "qzvkeyx", "qzvvaluex"

# Whether arguments are text, and what a message without content has.
_FORMS = ((False, ""), (True, ""), (False, None), (True, None))

Messages = Sequence[Mapping[str, Any]]


def with_calls(messages: Messages, template: Template) -> Messages:
    """Return the messages with tool calls in the form that the template writes.

    Raises:
        DataError: it writes them in none.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    refused: list[DataError] = []
    lost = DataError("The chat template does not write tool calls: leave out conversations that have them.")
    for as_text, empty in _FORMS:
        changed = [_reformed(message, as_text, empty) for message in messages]
        try:
            template(changed)
            laid_out = template([_reformed(message, as_text, empty) for message in _marked(messages)])
        except DataError as error:
            refused.append(error)
            continue
        if _are_written(laid_out, num_calls=sum(len(message.get("tool_calls", ())) for message in messages)):
            return changed
    raise refused[0] if len(refused) == len(_FORMS) else lost


def _reformed(message: Mapping[str, Any], as_text: bool, empty: str | None) -> Mapping[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _text(call["function"]["arguments"], as_text)}}
        for call in message["tool_calls"]
    ]
    return {**message, "content": message["content"] or empty, "tool_calls": calls}


def _text(arguments: Mapping[str, Any], as_text: bool) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if as_text else arguments


def _marked(messages: Messages) -> Iterator[Mapping[str, Any]]:
    number = 0
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            function = {"name": f"{_NAME}{number}x", "arguments": {f"{_KEY}{number}x": f"{_VALUE}{number}x"}}
            calls.append({**call, "function": {**call["function"], **function}})
            number += 1
        yield {**message, "tool_calls": calls} if calls else message


def _are_written(laid_out: str, *, num_calls: int) -> bool:
    words = [f"{word}{number}x" for word in (_NAME, _KEY, _VALUE) for number in range(num_calls)]
    # An object written as Python writes it, or JSON within JSON, is the other form that was wanted.
    misread = (f"'{_KEY}", f'\\"{_KEY}')
    return all(word in laid_out for word in words) and not any(form in laid_out for form in misread)
