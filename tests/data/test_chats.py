"""Rows of every shape to chats: all shapes of one conversation give the same chat, and what is none is a sentence."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transmla.data.chats import CHAT_COLUMNS, Chat, beside, read_chat, read_plain, without_filled
from transmla.errors import DataError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": "Let me look."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Sunny."},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def messages(value, **beside):
    return list(read_chat({"messages": value, **beside}, ("messages",)).messages)


def sharegpt(chat):
    return [{"from": SHAREGPT[message["role"]], "value": message["content"]} for message in chat]


def transposed(chat):
    return {key: [message[key] for message in chat] for key in chat[0]}


SHAPES = {
    "openai": CHAT,
    "sharegpt": sharegpt(CHAT),
    "names as OpenAI's under ShareGPT's keys": [{"from": m["role"], "value": m["content"]} for m in CHAT],
    "names as ShareGPT's under OpenAI's keys": [
        {"role": SHAREGPT[m["role"]].upper(), "content": m["content"]} for m in CHAT
    ],
    "json": json.dumps(CHAT),
    "json of ShareGPT's": json.dumps(sharegpt(CHAT)),
    "messages as json": [json.dumps(message) for message in CHAT],
    "parts": [
        {**m, "content": [{"type": "text", "text": c} for c in (m["content"][:3], m["content"][3:])]} for m in CHAT
    ],
    "parts without type": [{**m, "content": [m["content"][:3], {"text": m["content"][3:]}]} for m in CHAT],
    "null keys": [{**message, "name": None, "tool_calls": None, "weight": None, "value": None} for message in CHAT],
    "no calls": [{**message, "tool_calls": []} if message["role"] == "assistant" else message for message in CHAT],
    "an object of lists": transposed(CHAT),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "talk"])
def test_every_shape_under_every_column_is_the_same_chat(shape, column):
    chat = read_chat({column: SHAPES[shape], "id": 3}, (column,))
    assert list(chat.messages) == CHAT
    assert chat.tools is None
    assert chat.options == {}
    assert list(chat.learnt) == [message["role"] == "assistant" for message in CHAT]


@pytest.mark.parametrize("speaker", ["assistant", "gpt", "chatgpt", "model", "bard", "bing"])
def test_who_the_assistant_is(speaker):
    chat = read_chat({"c": [{"from": "human", "value": "a"}, {"from": speaker, "value": "b"}]}, ("c",))
    assert chat.messages[1]["role"] == "assistant"
    assert list(chat.learnt) == [False, True]


@pytest.mark.parametrize("speaker", ["tool", "observation", "function_response"])
def test_who_the_tools_are(speaker):
    assert messages([{"from": speaker, "value": "21"}]) == [{"role": "tool", "content": "21"}]


def test_roles_of_a_template_of_its_own_stay_and_unknown_ones_of_sharegpt_are_named():
    assert [
        m["role"] for m in messages([{"role": r, "content": "a"} for r in ("developer", "observation", "ipython")])
    ] == [
        "developer",
        "observation",
        "ipython",
    ]
    with pytest.raises(DataError, match=r"^Message 2 of column 'messages' is from 'narrator': known are user, human, "):
        messages([{"from": "human", "value": "a"}, {"from": "narrator", "value": "b"}])


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}},
        {"name": "weather", "arguments": {"city": "Rome", "days": 2}},
        {"type": "function", "name": "weather", "arguments": '{"city": "Rome", "days": 2}'},
        json.dumps(CALL),
        {"function": json.dumps(CALL["function"])},
    ],
)
@pytest.mark.parametrize("wrap", [lambda call: [call], lambda call: json.dumps([call])], ids=["list", "json"])
def test_tool_calls_have_objects_as_arguments_and_need_no_content(call, wrap):
    said = {"role": "assistant", "tool_calls": [CALL], "content": ""}
    assert messages([{"role": "assistant", "content": None, "tool_calls": wrap(call)}]) == [said]
    assert messages([{"role": "assistant", "tool_calls": wrap(call)}]) == [said]


def test_keys_of_a_call_are_kept_and_calls_without_arguments_have_none():
    given = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": ""}}
    assert messages([{"role": "assistant", "tool_calls": [given]}])[0]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {}}}
    ]
    bare = {"id": "c1", "name": "now"}
    assert messages([{"role": "assistant", "tool_calls": [bare]}])[0]["tool_calls"][0]["id"] == "c1"


@pytest.mark.parametrize(
    "said",
    [
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "function_call", "value": json.dumps([CALL["function"]])},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'},
        },
    ],
)
def test_function_calls_are_tool_calls(said):
    assert messages([said]) == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


def test_a_thought_before_a_function_call_is_kept():
    value = "<think>\nHm.\n</think>\n\n" + json.dumps(CALL["function"])
    assert messages([{"from": "function_call", "value": value}]) == [
        {"role": "assistant", "content": "<think>\nHm.\n</think>", "tool_calls": [CALL]}
    ]


@pytest.mark.parametrize("value", [{"degrees": 21}, [21, 22], 21.5, [{"degrees": "21"}], True])
def test_results_of_tools_are_text(value):
    assert json.loads(messages([{"role": "tool", "content": value, "name": "weather"}])[0]["content"]) == value


def test_other_keys_are_passed_on():
    said = {"role": "assistant", "content": "a", "reasoning_content": "b", "name": "c", "mood": {"d": [1]}}
    assert messages([said]) == [said]
    assert messages([{"role": "assistant", "reasoning_content": "b"}])[0]["content"] == ""


@pytest.mark.parametrize(
    ("keys", "learnt"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": 0.0}, False),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"weight": 1, "train": False}, False),
        ({"weight": None, "train": None}, True),
    ],
)
def test_what_is_learnt(keys, learnt):
    chat = read_chat(
        {"m": [{"role": "user", "content": "a", **keys}, {"role": "assistant", "content": "b", **keys}]}, ("m",)
    )
    assert list(chat.learnt) == [False, learnt]
    assert list(chat.messages) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


PROMPT, COMPLETION = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize("prompt", ["Why?", [PROMPT], json.dumps([PROMPT]), [{"from": "human", "value": "Why?"}]])
@pytest.mark.parametrize("completion", ["So.", [COMPLETION], json.dumps([COMPLETION])])
def test_prompt_and_completion(prompt, completion):
    chat = read_chat({"prompt": prompt, "completion": completion}, ("prompt", "completion"))
    assert list(chat.messages) == [PROMPT, COMPLETION]
    assert list(chat.learnt) == [False, True]


def test_what_the_assistant_says_in_a_prompt_is_given():
    chat = read_chat({"prompt": CHAT[:4], "completion": CHAT[4:]}, ("prompt", "completion"))
    assert list(chat.messages) == CHAT
    assert list(chat.learnt) == [False] * 4 + [True]


@pytest.mark.parametrize("text", ["[1, 2]", "[{", '[{"a": 1}]', '[{"role": "user"', " [{}] "])
def test_texts_with_brackets_are_texts(text):
    chat = read_chat({"prompt": text, "completion": text}, ("prompt", "completion"))
    assert [message["content"] for message in chat.messages] == [text, text]


@settings(deadline=None)
@given(st.text(), st.text())
def test_plain_prompt_and_completion(prompt, completion):
    text, (start, stop) = read_plain({"prompt": prompt, "completion": completion}, ("prompt", "completion"))
    assert (text[:start], text[start:stop], text[stop:]) == (prompt, completion, "")


@pytest.mark.parametrize("value", [None, 3, CHAT])
def test_plain_prompt_and_completion_are_text(value):
    with pytest.raises(DataError, match=r"^Column 'completion' holds .*: without a chat template it must be text\."):
        read_plain({"prompt": "a", "completion": value}, ("prompt", "completion"))


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], [TOOL["function"]]])
def test_tools(tools):
    assert read_chat({"messages": CHAT, "tools": tools}, ("messages",)).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tools):
    assert read_chat({"messages": CHAT, "tools": tools}, ("messages",)).tools is None


def test_the_system_column():
    assert messages(CHAT[1:], system="Be brief.") == CHAT
    assert messages(CHAT, system="Be brief.") == CHAT
    assert messages(CHAT, system="") == messages(CHAT, system=None) == CHAT
    chat = read_chat({"prompt": "a", "completion": "b", "system": "c"}, ("prompt", "completion"))
    assert [message["content"] for message in chat.messages] == ["c", "a", "b"]
    assert list(chat.learnt) == [False, False, True]
    with pytest.raises(DataError, match=r"^Column 'system' holds another text than the chat's own system message"):
        messages(CHAT, system="Be verbose.")


@pytest.mark.parametrize("options", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_options_of_the_template(options):
    row = {"messages": CHAT, "chat_template_kwargs": options}
    assert read_chat(row, ("messages",)).options == {"enable_thinking": False}


def test_columns_that_are_read_with_a_chat():
    assert beside(["id", "tools", "messages", "chat_template_kwargs"]) == ("tools", "chat_template_kwargs")
    assert beside(["id"]) == ()
    assert CHAT_COLUMNS[0] == ("messages",)


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "Column 'messages' holds null: a list of messages is needed."),
        ("Hello.", "Column 'messages' holds text that is not JSON: a list of messages is needed."),
        ("[" * 100_000, "Column 'messages' holds text that is not JSON: a list of messages is needed."),
        ('{"role": "user"}', "Column 'messages' holds an object: a list of messages is needed."),
        (USER, "Column 'messages' holds an object: a list of messages is needed."),
        ({}, "Column 'messages' holds an object: a list of messages is needed."),
        (3, "Column 'messages' holds a number: a list of messages is needed."),
        ([], "Column 'messages' holds an empty list: a chat needs a message."),
        ([CHAT, CHAT], "Column 'messages' holds a list of chats: each needs a row of its own."),
        (["Hello.", "Hi."], "Column 'messages' holds a list of texts, not of messages with role and content."),
        (
            [USER, "{"],
            "Message 2 of column 'messages' holds text that is not JSON: a message with role and content is needed.",
        ),
        ([USER, None], "Message 2 of column 'messages' holds null: a message with role and content is needed."),
        (
            [{"content": "a"}],
            "Message 1 of column 'messages' has no role: a message needs role and content, or from and value.",
        ),
        ([{"role": 1, "content": "a"}], "Message 1 of column 'messages' holds a number as role: text is needed."),
        ([{"role": "user"}], "Message 1 of column 'messages' has no content."),
        ([{"role": "assistant", "content": None}], "Message 1 of column 'messages' has no content."),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "Message 1 of column 'messages' has no content."),
        ([{"role": "user", "content": 3}], "Message 1 of column 'messages' holds a number as content: text is needed."),
        (
            [{"role": "user", "content": [{"type": "image", "url": "a"}]}],
            "Message 1 of column 'messages' has a part of type 'image' in its content: only text can be read.",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "Message 1 of column 'messages' has a part without text in its content.",
        ),
        ([{**USER, "weight": 0.5}], "Message 1 of column 'messages' has weight 0.5: only 0 and 1 are known."),
        ([{**USER, "train": "no"}], "Message 1 of column 'messages' has train 'no': only true and false are known."),
        (
            [{"role": "assistant", "tool_calls": [{"arguments": {}}]}],
            "Message 1 of column 'messages' has a tool call without the name of a function.",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": "b c"}]}],
            "Message 1 of column 'messages', arguments of a, holds text that is not JSON: an object is needed.",
        ),
        (
            [{"role": "assistant", "tool_calls": {"name": "a"}}],
            "Message 1 of column 'messages', tool_calls, holds an object: a list of calls is needed.",
        ),
        (
            [{"from": "function_call", "value": "weather"}],
            "Message 1 of column 'messages' holds text that is not JSON: a function call, an object with name and "
            "arguments, is needed.",
        ),
        (
            [{"role": "assistant", "content": "a", "thinking": ["b"]}],
            "Message 1 of column 'messages' holds a list as thinking: text is needed.",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_what_is_no_chat_is_a_sentence(value, sentence):
    with pytest.raises(DataError) as caught:
        messages(value)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"tools": "weather"},
            "Column 'tools' holds text that is not JSON: a list of JSON schemas of functions is needed.",
        ),
        ({"tools": TOOL}, "Column 'tools' holds an object: a list of JSON schemas of functions is needed."),
        ({"tools": [3]}, "Column 'tools' holds a number: a list of JSON schemas of functions is needed."),
        ({"system": ["a"]}, "Column 'system' holds a list: text is needed."),
        (
            {"chat_template_kwargs": [1]},
            "Column 'chat_template_kwargs' holds a list: an object with variables for the chat template is needed.",
        ),
    ],
)
def test_what_stands_beside_a_chat_and_is_not_as_it_must_be(row, sentence):
    with pytest.raises(DataError) as caught:
        messages(CHAT, **row)
    assert str(caught.value) == sentence


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "from", "content", "value", "tool_calls", "function", "name", "arguments", "type", "text"]
            )
            | st.text(max_size=2),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(ANY, ANY, ANY)
def test_anything_is_a_chat_or_a_sentence(value, tools, options):
    row = {"messages": value, "tools": tools, "chat_template_kwargs": options}
    try:
        chat = read_chat(row, ("messages",))
    except DataError:
        return
    assert isinstance(chat, Chat)
    assert len(chat.messages) == len(chat.learnt) > 0
    assert all(isinstance(message["content"], str) and isinstance(message["role"], str) for message in chat.messages)


@settings(deadline=None)
@given(ANY)
def test_what_arrow_fills_in_is_taken_out(value):
    def holds_null(value):
        if isinstance(value, dict):
            return any(item is None or holds_null(item) for item in value.values())
        return isinstance(value, list) and any(map(holds_null, value))

    emptied = without_filled(value)
    assert not holds_null(emptied)
    if not holds_null(value):
        assert emptied == value


def test_what_arrow_fills_in_does_not_reach_the_template():
    filled = [
        {"role": "user", "content": "a", "tool_calls": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome", "zone": None}}, "id": None}],
        },
    ]
    row = without_filled({"messages": filled, "tools": [{**TOOL, "strict": None}]})
    chat = read_chat(row, ("messages",))
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert chat.tools == [TOOL]
