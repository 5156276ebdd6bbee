"""Chats by templates of many kinds: what is learnt is what the assistant said, after what would prompt it to."""

import json
import random
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.data import templates
from tests.factory import tiny_tokenizer
from transmla.data.chats import Chat, read_chat
from transmla.data.layout import Laid, encode, laid_out, samples
from transmla.data.template import choose_template
from transmla.errors import DataError

NAMES = [name for name in dir(templates) if name.isupper()]
# What precedes the words of an answer where they are not prompted for, and what ends it.
PLAIN = {
    "CHATML": ("", "<|im_end|>\n"),
    "UNPROMPTED": ("<|im_start|>assistant\n", "<|im_end|>\n"),
    "LLAMA": ("", "<|eot|>"),
    "QWEN25": ("", "<|im_end|>\n"),
    "DEEPSEEK": ("", "<|end|>"),
    "MISTRAL": (" ", "</s>"),
    "GEMMA": ("", "<end_of_turn>\n"),
    "ZEPHYR": ("", "</s>\n"),
}
# What an answer begins with where nothing prompts it.
UNPROMPTED = {name: PLAIN[name][0] for name in ("UNPROMPTED", "MISTRAL")}
TRIMMING = {"LLAMA", "GEMMA"}
CALLING = ["LLAMA", "QWEN25", "QWEN3", "QWEN3_THINKING", "DEEPSEEK", "R1"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    made = {}
    for name in NAMES:
        made[name] = tiny_tokenizer()
        made[name].chat_template = getattr(templates, name)
    return made


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def turns(*answers):
    """A chat in which each answer has a question; an answer is text or further keys of the message."""
    chat = []
    for number, answer in enumerate(answers):
        keys = {"content": answer} if isinstance(answer, str) else answer
        chat += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "", **keys}]
    return chat


def read(messages, **beside):
    return read_chat({"messages": messages, **beside}, ("messages",))


def spoken(laid):
    return [laid.text[start:stop] for start, stop in laid.spans]


def squeezed(text):
    return "".join(text.split())


def stock(tokenizer, messages, **options):
    """A text as transformers itself has it, with the date as it stands in the test."""
    source = choose_template(tokenizer.chat_template, tools=bool(options.get("tools")))
    for form in ("%d %b %Y", "%Y-%m-%d"):
        for quote in "'\"":
            source = source.replace(f"strftime_now({quote}{form}{quote})", f"'{datetime(2024, 7, 26).strftime(form)}'")
    return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None)
@given(answers=st.lists(WORDS, min_size=1, max_size=4), learnt=st.lists(st.booleans(), min_size=4, max_size=4))
def test_a_chat_is_one_sample_with_the_answers_and_their_ends(tokenizers, name, answers, learnt):
    messages = turns(*answers)
    for message, wanted in zip(messages[1::2], learnt, strict=False):
        message["weight"] = int(wanted)
    found = samples(read(messages), tokenizers[name])
    before, end = PLAIN[name]
    chosen = [
        answer.strip() if name in TRIMMING else answer
        for answer, wanted in zip(answers, learnt, strict=False)
        if wanted
    ]
    if not chosen:
        assert found == []
        return
    (laid,) = found
    assert spoken(laid) == [before + answer + end for answer in chosen]
    last = max(number for number in range(len(answers)) if learnt[number])
    clean = [{key: message[key] for key in ("role", "content")} for message in messages]
    assert laid.text == stock(tokenizers[name], clean[: 2 * last + 2])


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_chat_is_laid_out_as_transformers_does(tokenizers, name):
    messages = turns("answer 0", "answer 1")
    assert laid_out(read(messages), tokenizers[name]) == stock(tokenizers[name], messages)
    assert laid_out(read(messages[:3]), tokenizers[name]) == stock(tokenizers[name], messages[:3])


THOUGHTS = {
    "in the content": lambda thought, answer: {"content": f"<think>\n{thought}\n</think>\n\n{answer}"},
    "on one line": lambda thought, answer: {"content": f"<think>{thought}</think>{answer}"},
    "reasoning_content": lambda thought, answer: {"reasoning_content": thought, "content": answer},
    "reasoning": lambda thought, answer: {"reasoning": thought, "content": answer},
    "thinking": lambda thought, answer: {"thinking": thought, "content": answer},
}


@pytest.mark.parametrize("form", THOUGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_thoughts_are_learnt_whatever_the_template_drops(tokenizers, name, form):
    """Every answer is learnt once, thought and all, right after the prompt that transformers makes for it."""
    messages = turns(*(THOUGHTS[form](f"thought {number}", f"answer {number}") for number in range(3)))
    laid = samples(read(messages), tokenizers[name])
    found = [(one.text[:start], one.text[start:stop]) for one in laid for start, stop in one.spans]
    assert len(found) == 3
    for number, (before, said) in enumerate(found):
        prompt = stock(tokenizers[name], messages[: 2 * number + 1], add_generation_prompt=True)
        assert before[before.rindex("question") :] == prompt[prompt.rindex("question") :]
        assert len(laid) == 1 or before == prompt
        assert said.startswith(UNPROMPTED.get(name, ""))
        words = squeezed(said)
        assert words.index(f"thought{number}") < words.index(f"answer{number}")
        assert [words.count(word) for word in ("thought", "answer")] == [1, 1]
        turn = (before + said)[(before + said).rindex("question") :]
        assert turn.count("<think>") == turn.count("</think>") <= 1


def test_thoughts_as_qwen3_has_them(tokenizers):
    messages = turns("<think>\nt0\n</think>\n\na0", "<think>\nt1\n</think>\n\na1")
    first, second = samples(read(messages), tokenizers["QWEN3"])
    assert first.text == stock(tokenizers["QWEN3"], messages[:2])
    assert second.text == stock(tokenizers["QWEN3"], messages)
    assert spoken(first) == ["<think>\nt0\n</think>\n\na0<|im_end|>\n"]
    assert spoken(second) == ["<think>\nt1\n</think>\n\na1<|im_end|>\n"]
    assert "t0" not in second.text


def test_thoughts_as_r1_has_them(tokenizers):
    messages = turns("<think>\nt0\n</think>\n\na0", "<think>\nt1\n</think>\n\na1")
    assert samples(read(messages), tokenizers["R1"]) == [
        Laid(text, ((text.rindex("<think>\n") + 8, len(text)),))
        for text in (
            "<s><|User|>question 0<|Assistant|><think>\nt0\n</think>\n\na0<|end|>",
            "<s><|User|>question 0<|Assistant|>\n\na0<|end|>"
            "<|User|>question 1<|Assistant|><think>\nt1\n</think>\n\na1<|end|>",
        )
    ]
    (plain,) = samples(read(turns("a0")), tokenizers["R1"])
    assert plain.text.endswith("<|Assistant|><think>\na0<|end|>")


CALLS = [{"function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}, "type": "function"}]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
]


@pytest.mark.parametrize(
    "thought", [{}, {"content": "<think>\nhm\n</think>\n\n"}, {"reasoning_content": "hm"}], ids=str
)
@pytest.mark.parametrize("name", CALLING)
def test_tool_calls_are_learnt(tokenizers, name, thought):
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": CALLS, **thought},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    said = [part for laid in samples(read(messages, tools=TOOLS), tokenizers[name]) for part in spoken(laid)]
    assert len(said) == 2
    call, answer = said
    assert call.count("weather") == 1
    assert json.dumps(CALLS[0]["function"]["arguments"], ensure_ascii=False) in call
    assert "It is sunny." in answer
    if thought:
        assert call.count("hm") == 1
        assert call.index("hm") < call.index("weather")
    whole = laid_out(read(messages, tools=TOOLS), tokenizers[name])
    assert "Köln" in whole
    assert "sunny" in whole


def test_what_is_said_beside_calls_that_the_template_leaves_out(tokenizers):
    (laid,) = samples(read(turns({"content": "Let me look.", "tool_calls": CALLS})), tokenizers["LLAMA"])
    arguments = json.dumps(CALLS[0]["function"]["arguments"], ensure_ascii=False)
    assert spoken(laid) == ['Let me look.{"name": "weather", "parameters": ' + arguments + "}<|eot|>"]


@pytest.mark.parametrize("name", ["CHATML", "ZEPHYR", "GEMMA", "MISTRAL"])
def test_calls_that_no_template_writes_are_refused(tokenizers, name):
    chat = read(turns("a", {"tool_calls": CALLS}))
    for lay_out in (samples, laid_out):
        with pytest.raises(DataError, match=r"^The chat template does not write tool calls: leave out conversations"):
            lay_out(chat, tokenizers[name])


def test_arguments_are_json_however_the_template_writes_them():
    calls = "{% for call in m.tool_calls or [] %}{{ call.function.name }}FORM{% endfor %}"
    written = "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}"
    for form in (
        "{{ call.function.arguments }}",
        "{{ call.function.arguments | tojson }}",
        "{{ '' + call.function.arguments }}",
    ):
        text = laid_out(read(turns({"tool_calls": CALLS})), with_template(written.replace("FORM", form)))
        assert json.loads(text.removeprefix("question 0weather")) == CALLS[0]["function"]["arguments"]


def test_a_chat_that_the_assistant_begins(tokenizers):
    (laid,) = samples(read([{"role": "assistant", "content": "quick"}, *turns("b")]), tokenizers["CHATML"])
    assert spoken(laid) == ["quick<|im_end|>\n", "b<|im_end|>\n"]


def test_tools_and_options_reach_the_template(tokenizers):
    assert '"properties": {"city": {}}' in laid_out(read(turns("a"), tools=TOOLS), tokenizers["QWEN25"])
    (laid,) = samples(read(turns("a"), chat_template_kwargs={"enable_thinking": False}), tokenizers["QWEN3"])
    assert spoken(laid) == ["a<|im_end|>\n"]
    assert laid.text.endswith("<think>\n\n</think>\n\na<|im_end|>\n")
    dated = laid_out(read(turns("a"), chat_template_kwargs={"date_string": "1 Jan 2000"}), tokenizers["LLAMA"])
    assert "Today: 1 Jan 2000" in dated
    for name in ("tokenize", "add_generation_prompt", "messages", "chat_template", "tools"):
        with pytest.raises(DataError, match=rf"^Column 'chat_template_kwargs' sets {name}: "):
            laid_out(read(turns("a"), chat_template_kwargs={name: True}), tokenizers["CHATML"])


@pytest.mark.parametrize(
    "form",
    ["%d %b %Y", "%Y-%m-%d", "%H:%M:%S", "%A, %B %d, %y", "%-d/%-m", "%I:%M %p", "%j%%d", "%F %T", "no date", "%e %a"],
)
def test_the_date_stands_still(form):
    tokenizer = with_template(
        "\n  {{ strftime_now('"
        + form
        + "') }}|{% macro now() %}{{ strftime_now(format='"
        + form
        + "') }}{% endmacro %}{{ now() }}"
    )
    date = datetime(2024, 7, 26).strftime(form)
    assert laid_out(read(turns("a")), tokenizer) == f"\n  {date}|{date}"


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n\n  ", "a\n", " a "])
@pytest.mark.parametrize(
    "first", ["{% if true %}b{% endif %}", "{%- if true %}\nb\n{% endif -%}", "{{ 'b' }}", "{{- 'b' }}"]
)
def test_the_clock_changes_no_white_space(start, first):
    plain = start + first + "\n {% if strftime_now is defined %}c{% endif %}"
    without = plain.replace("strftime_now", "messages")
    assert laid_out(read(turns("a")), with_template(plain)) == laid_out(read(turns("a")), with_template(without))


def test_chance_stands_still():
    tokenizer = with_template("{{ range(100000) | random }} {{ lipsum(n=1) }}")
    random.seed(3)
    state = random.getstate()
    first = laid_out(read(turns("a")), tokenizer)
    assert random.getstate() == state
    random.seed(4)
    assert laid_out(read(turns("a")), tokenizer) == first


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Begin with  the\nuser.') }}", r"Begin with the user"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 'a' + 1 }}", "str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages.__class__.__base__ }}", "unsafe|undefined|no attribute"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% if %}", "Expected an expression"),
        ("{{ '%d' | format('a') }}", "number"),
        ("{{ messages | map('no_filter') | list }}", "no_filter"),
    ],
)
def test_what_a_template_refuses_is_one_sentence(template, reason):
    for lay_out in (samples, laid_out):
        with pytest.raises(
            DataError, match=rf"^The chat template does not take the conversation \(.*({reason}).*\)\.$"
        ) as caught:
            lay_out(read(turns("a")), with_template(template))
        assert "Error" not in str(caught.value)


def test_turns_that_must_alternate(tokenizers):
    with pytest.raises(DataError, match=r"must alternate user/assistant/user/assistant/\.\.\.\)\.$|alternate.*\)\.$"):
        samples(read([*turns("a"), {"role": "assistant", "content": "b"}]), tokenizers["MISTRAL"])
    with pytest.raises(DataError, match=r"\(System role not supported\)\.$"):
        samples(read([{"role": "system", "content": "s"}, *turns("a")]), tokenizers["GEMMA"])


def test_a_template_that_does_not_write_answers():
    with pytest.raises(DataError, match=r"^The chat template does not write what the assistant says\.$"):
        samples(
            read(turns("answer")),
            with_template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
        )


def test_which_of_several_templates():
    both = {"default": "d", "tool_use": "t"}
    assert [choose_template(both, tools=tools) for tools in (False, True)] == ["d", "t"]
    assert [choose_template({"tool_use": "t"}, tools=tools) for tools in (False, True)] == ["t", "t"]
    assert [choose_template({"rag": "r", "tool_use": "t"}, tools=tools) for tools in (False, True)] == [None, "t"]
    assert choose_template({"default": "d", "rag": "r"}, tools=True) == "d"
    assert choose_template("x", tools=True) == "x"
    tokenizer = with_template({"rag": "r", "tool_use": "t"})
    assert laid_out(read(turns("a"), tools=TOOLS), tokenizer) == "t"
    with pytest.raises(
        DataError, match=r"^The tokenizer of the model has several chat templates \(rag, tool_use\), and none"
    ):
        laid_out(read(turns("a")), tokenizer)


@pytest.mark.parametrize("template", [None, "", {}])
def test_no_template(template):
    with pytest.raises(
        DataError, match=r"^This is a conversation, but the tokenizer of the model has no chat template: .*--text-c"
    ):
        laid_out(read(turns("a")), with_template(template))


def test_tokens_of_a_chat(tokenizers):
    (laid,) = samples(read(turns("answer 0", "answer 1")), tokenizers["ZEPHYR"])
    tokens, learnt = encode(laid, tokenizers["ZEPHYR"])
    assert tokens == tokenizers["ZEPHYR"](laid.text, add_special_tokens=False)["input_ids"]
    said = tokenizers["ZEPHYR"].decode([token for token, wanted in zip(tokens, learnt, strict=True) if wanted])
    assert said == "".join(spoken(laid))


def test_a_chat_without_learnt_flags_learns_from_the_assistant():
    assert list(Chat(turns("a")).learnt) == [False, True]
