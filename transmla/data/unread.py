"""What of a chat a template leaves out without a word: tools, its own variables, and messages of some roles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from jinja2 import Environment, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from transmla.data.chats import OPTIONS, TOOLS, Chat
from transmla.data.messages import ASSISTANT
from transmla.data.template import Template, choose_template, open_template
from transmla.errors import DataError

# A word that no template and no chat has.
_PROBE = "qzvunreadx"


def unread_by_template(chat: Chat, tokenizer: PreTrainedTokenizerBase, roles: set[tuple[str, bool]]) -> Iterator[str]:
    """Yield what a template does not read: columns beside a chat, and messages by their role.

    Args:
        chat: as it was read.
        tokenizer: whose template it is.
        roles: those that have been tried, at the start of a chat and within; what is tried now is added.
    """
    try:
        template = open_template(tokenizer, tools=chat.tools, options=chat.options)
    except DataError:
        # Said when the chat is laid out.
        return
    source = choose_template(tokenizer.chat_template, tools=bool(chat.tools)) or ""
    if chat.tools and TOOLS not in _names(source):
        yield TOOLS
    yield from (f"{OPTIONS}.{name}" for name in chat.options if name not in _names(source))
    for number, message in enumerate(chat.messages):
        role, tried = message["role"], (message["role"], number == 0)
        if role != ASSISTANT and message["content"] and tried not in roles:
            roles.add(tried)
            if not _is_written(chat, number, template):
                yield f"messages of {role}"


@cache
def _names(source: str) -> frozenset[str]:
    """Return all names in a template, those of its variables among them."""
    try:
        return frozenset(word for _, kind, word in Environment().lex(source) if kind == "name")
    except TemplateSyntaxError:
        # Said when a chat is laid out.
        return frozenset({TOOLS})


def _is_written(chat: Chat, number: int, template: Template) -> bool:
    """Return whether a template writes what a message says: in the whole chat, or where it is the last of one."""
    changed = [*chat.messages]
    changed[number] = {**changed[number], "content": _PROBE}
    refused = 0
    for messages in (changed, changed[: number + 1]):
        try:
            if _PROBE in template(messages):
                return True
        except DataError:
            refused += 1
    return refused == 2
