"""A chat to text, by the tokenizer's chat template, and where in it the assistant speaks.

What is learnt is what the assistant said, thoughts included, after the text that the model will be given when it is to
answer. A template lays an answer out for those that come later, though, and may leave things out: R1's cuts thoughts
out of every answer, Qwen3's out of all but the last. Where a conversation as the template has it holds all that was
said, it is one sample; else each answer is a sample of its own, and one that the template shortens is laid out as it
was generated: what prompts an answer, the answer as written, and the mark that ends it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from transmla.data.calls import Messages, with_calls
from transmla.data.chats import Chat
from transmla.data.messages import ASSISTANT, THOUGHTS
from transmla.data.spans import encode_spans
from transmla.data.template import Template, open_template
from transmla.errors import DataError

# The end of a prompt that opens a thought, which the model goes on with.
_OPENED = re.compile(r"(<(think|thinking|thought|reasoning)>|\[(THINK)\])\s*\Z")
# A word in the place of what is said, to see what stands around it.
_PROBE = "qzvprobex"


@dataclass(frozen=True)
class Laid:
    """A conversation, or a part of one, laid out as text.

    Attributes:
        text: all of it, with the token that begins a text if the template writes that.
        spans: of characters, [start, stop): what the assistant says and is to be learnt, its end mark included.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def laid_out(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a whole conversation as text.

    Raises:
        DataError: there is no template, or it does not take the conversation.
    """
    template = open_template(tokenizer, tools=chat.tools, options=chat.options)
    return template(with_calls(chat.messages, template))


def samples(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[Laid]:
    """Return what there is to learn from a conversation: one text with all answers, or one for each; none without any.

    Raises:
        DataError: there is no template, or it does not take the conversation.
    """
    learnt = [number for number, wanted in enumerate(chat.learnt) if wanted]
    if not learnt:
        return []
    template = open_template(tokenizer, tools=chat.tools, options=chat.options)
    # What is said after the last answer teaches nothing.
    messages = with_calls(chat.messages[: learnt[-1] + 1], template)
    answers = [_answer(messages[: number + 1], template) for number in learnt]
    whole = answers[-1].laid.text
    if all(answer.as_in_history and whole.startswith(answer.laid.text) for answer in answers):
        return [Laid(whole, tuple(span for answer in answers for span in answer.laid.spans))]
    return [answer.laid for answer in answers]


def encode(laid: Laid, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return the tokens of a text, without special ones around it, and whether each is to be learnt."""
    return encode_spans(laid.text, laid.spans, tokenizer)


@dataclass(frozen=True)
class _Answer:
    laid: Laid
    as_in_history: bool


def _answer(messages: Messages, template: Template) -> _Answer:
    """Lay out a conversation up to an answer, the last of the messages."""
    *earlier, message = messages
    history = template(messages)
    prompt = template(earlier, prompt=True) if earlier else _opening(history, template)
    opened = _OPENED.search(prompt)
    if history.startswith(prompt):
        start = opened.start() if opened else len(prompt)
        if _holds(history[start:], message):
            return _Answer(Laid(history, ((len(prompt), len(history)),)), as_in_history=True)
    said = _header(earlier, prompt, template) + _as_written(message, opened) + _end(earlier, message, template)
    return _Answer(Laid(prompt + said, ((len(prompt), len(prompt) + len(said)),)), as_in_history=False)


def _opening(history: str, template: Template) -> str:
    """Return what a template puts before the first words of all, where there is nothing that could prompt them."""
    head = _before_words([], template)
    same = next(
        (place for place, (one, other) in enumerate(zip(head, history, strict=False)) if one != other), len(head)
    )
    return head[:same]


def _header(earlier: Messages, prompt: str, template: Template) -> str:
    """Return what a model has to write itself before an answer, where a template does not prompt for one."""
    if not earlier or template(earlier) != prompt:
        return ""
    head = _before_words(earlier, template)
    return head.removeprefix(prompt) if head.startswith(prompt) else ""


def _before_words(earlier: Messages, template: Template) -> str:
    """Return what a template puts before the words of an answer."""
    return template([*earlier, {"role": ASSISTANT, "content": _PROBE}]).rpartition(_PROBE)[0]


def _thought(message: Mapping[str, Any]) -> str:
    return next((message[key] for key in THOUGHTS if message.get(key)), "").strip()


def _holds(text: str, message: Mapping[str, Any]) -> bool:
    """Return whether all that a message says is there, in order; templates may trim and indent."""
    text = _squeezed(text)
    for said in (_thought(message), message["content"] or ""):
        _, found, text = text.partition(_squeezed(said)) if said.strip() else ("", "all", text)
        if not found:
            return False
    return True


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _as_written(message: Mapping[str, Any], opened: re.Match[str] | None) -> str:
    """Return what a message says, after a prompt that may have opened its thought already."""
    content, thought = message["content"] or "", _thought(message)
    tag = opened.group(1) if opened else "<think>"
    if thought and _squeezed(thought) not in _squeezed(content):
        content = f"{tag}\n{thought}\n{tag[0]}/{tag[1:]}\n\n{content}"
    if opened and content.lstrip().startswith(tag):
        content = content.lstrip().removeprefix(tag)
        return content.lstrip() if opened.end(1) < opened.end() else content
    return content


def _end(earlier: Messages, message: Mapping[str, Any], template: Template) -> str:
    """Return what a template puts after what is said: the tool calls, and the mark that ends an answer."""
    spoken = {key: value for key, value in message.items() if key not in THOUGHTS}
    _, found, end = template([*earlier, {**spoken, "content": _PROBE}]).rpartition(_PROBE)
    if spoken.get("tool_calls") and not (found and message["content"]):
        # Beside calls, a template may leave out what is said, or set it off from them.
        head = _before_words(earlier, template)
        calls = template([*earlier, {**spoken, "content": "" if message["content"] else message["content"]}])
        if calls.startswith(head):
            return calls.removeprefix(head)
    if not found:
        raise DataError("The chat template does not write what the assistant says.")
    return end
