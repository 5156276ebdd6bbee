"""A tokenizer's chat template, which is a small program: which one, with what, and what it says when it refuses.

The same conversation gives the same text on every day and in every process: a training can be resumed, and a
measurement repeated. Templates that write today's date are given the one that Llama's write where there is no clock,
and what they draw at random is drawn from the same seed.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from transmla.data.messages import THOUGHTS
from transmla.data.tokens import check_characters
from transmla.errors import DataError

_DATE = datetime(2024, 7, 26)
_CLOCK = "strftime_now"
_FOR_TOOLS, _DEFAULT = "tool_use", "default"


def choose_template(templates: str | Mapping[str, str], *, tools: bool = False) -> str | None:
    """Return the template for a conversation, out of those that have names; None where none of them is for all.

    Args:
        templates: ``chat_template`` of a tokenizer, one or several by name.
        tools: whether the assistant may call tools.
    """
    if isinstance(templates, str):
        return templates
    if tools and _FOR_TOOLS in templates:
        return templates[_FOR_TOOLS]
    only = next(iter(templates.values())) if len(templates) == 1 else None
    return templates.get(_DEFAULT, only)


@dataclass(frozen=True)
class Template:
    """The template of one conversation.

    Attributes:
        tokenizer: whose template it is.
        source: the template itself.
        tools: that it is to list.
        options: further variables for it.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    tools: Sequence[Mapping[str, Any]] | None
    options: Mapping[str, Any]

    def __call__(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        """Return messages as text, with what prompts an answer if that is wanted.

        Raises:
            DataError: the template does not take them.
        """
        try:
            with _same_chance():
                laid_out = self.tokenizer.apply_chat_template(
                    [_with_thought(message) for message in messages],
                    tools=self.tools,
                    chat_template=self.source,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **self.options,
                )
        # Templates refuse what they do not know as they please, and fail in all the ways that programs do.
        except Exception as error:
            reason = " ".join(str(error).split()) or "it does not say why"
            raise DataError(f"The chat template does not take the conversation ({reason.rstrip('.')}).") from None
        check_characters(str(laid_out))
        return str(laid_out)


def open_template(
    tokenizer: PreTrainedTokenizerBase, *, tools: Sequence[Mapping[str, Any]] | None, options: Mapping[str, Any]
) -> Template:
    """Return the template of a tokenizer for conversations with these tools.

    Raises:
        DataError: it has none, several of which none is the default, or takes no such options.
    """
    templates = tokenizer.chat_template
    if not templates:
        raise DataError(
            "This is a conversation, but the tokenizer of the model has no chat template: pass a data set with text, "
            "and --text-column where there are several columns."
        )
    source = choose_template(templates, tools=bool(tools))
    if source is None:
        raise DataError(
            f"The tokenizer of the model has several chat templates ({', '.join(templates)}), and none of them is the "
            "default: name one of them default."
        )
    arguments = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"} - {"documents"}
    if taken := sorted(arguments & options.keys()):
        raise DataError(
            f"Column 'chat_template_kwargs' sets {', '.join(taken)}: no variable of templates has that name."
        )
    clock = _stopped_clock() if _CLOCK in source else ""
    return Template(tokenizer, clock + source, tools or None, options)


def _stopped_clock() -> str:
    """Return a macro to put before a template, with the name of transformers' clock: it gives the same date always.

    A function cannot be handed to a template: transformers makes text of it. The line end goes with the macro's tag, so
    that the template begins a line, as its white space expects.
    """
    written = {f"%{letter}": _DATE.strftime(f"%{letter}") for letter in "aAbBcdfHIjmMpSuUVwWxXyYGzZ"}
    written |= {"%F": f"{_DATE:%Y-%m-%d}", "%T": f"{_DATE:%H:%M:%S}", "%R": f"{_DATE:%H:%M}", "%D": f"{_DATE:%m/%d/%y}"}
    written |= {f"%-{letter}": _DATE.strftime(f"%{letter}").lstrip("0") or "0" for letter in "dHIjmMSy"}
    written |= {"%e": f"{_DATE.day:2d}", "%h": f"{_DATE:%b}", "%s": str(int(_DATE.replace(tzinfo=UTC).timestamp()))}
    changes = "".join(f" | replace({code!r}, {text!r})" for code, text in written.items())
    # A percent sign is written as two; set aside, it begins nothing.
    changes = f" | replace('%%', '\ue000'){changes} | replace('\ue000', '%')"
    return f"{{%- macro {_CLOCK}(format) -%}}{{{{- format{changes} -}}}}{{%- endmacro %}}\n"


def _with_thought(message: Mapping[str, Any]) -> dict[str, Any]:
    # The names that templates read a thought by, whatever name it came by: so the newest transformers has it, too.
    thought = next((message[key] for key in THOUGHTS if message.get(key)), None)
    return dict(message) if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


@contextmanager
def _same_chance() -> Iterator[None]:
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)
