"""Texts that are made: each is read back as a person would, and holds what is asked for."""

import ast
import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.factory import TEXT, tiny_tokenizer
from transmla.data.probes import code_prompt, json_prompt, needles_prompt, passage_prompts
from transmla.errors import UsageError

MADE = (needles_prompt, json_prompt, code_prompt)
LENGTHS = (256, 700)
made = pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
everywhere = pytest.mark.parametrize(("length", "seed"), [(length, seed) for length in LENGTHS for seed in range(4)])


def read(trial):
    """A text and its answer, as the tokenizer decodes them."""
    tokenizer = tiny_tokenizer()
    return tokenizer.decode(trial.tokens[: -trial.answer]), tokenizer.decode(trial.tokens[-trial.answer :])


@everywhere
def test_one_of_several_numbers_is_asked_for(length, seed):
    text, answer = read(needles_prompt(tiny_tokenizer(), length=length, seed=seed))
    known = re.findall(r"The number of (\w+) is ((?:\d )+\d)\.", text)
    numbers = dict(known)
    assert len(known) == len(numbers) == len(set(numbers.values())) >= (2 if length == 256 else 8)
    asked = re.fullmatch(r".*\. Which number does (\w+) have\? The number of (\w+) is", text, re.DOTALL)
    assert asked[1] == asked[2]
    assert answer.strip() == numbers[asked[1]]


def test_any_of_the_numbers_may_be_asked_for():
    """And it may stand anywhere."""
    cities, places = set(), set()
    for seed in range(30):
        text, _ = read(needles_prompt(tiny_tokenizer(), length=700, seed=seed))
        city = text.split()[-2]
        cities.add(city)
        places.add(text.index(f"The number of {city} is") * 4 // len(text))
    assert len(cities) > 8
    assert places >= {0, 1, 2}


@everywhere
def test_the_value_of_a_key_is_asked_for(length, seed):
    trial = json_prompt(tiny_tokenizer(), length=length, seed=seed)
    text, answer = read(trial)
    pairs = json.loads(text[text.index("{") : text.index("}") + 1], object_pairs_hook=list)
    values = dict(pairs)
    assert len(values) == len(pairs) > length // 40
    asked = re.search(r'\}\n\nThe value of "(\w+)" is "\Z', text)
    assert answer == values[asked[1]]
    # The very tokens stand in the object.
    before, said = trial.tokens[: -trial.answer], trial.tokens[-trial.answer :]
    assert said in {before[place : place + len(said)] for place in range(len(before))}


@everywhere
def test_names_are_called_as_they_were_defined_and_what_is_open_does_not_count(length, seed):
    tokenizer = tiny_tokenizer()
    trial = code_prompt(tokenizer, length=length, seed=seed)
    tree = ast.parse(tokenizer.decode(trial.tokens))
    *functions, main = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    called = [node.func.id for node in ast.walk(main) if isinstance(node, ast.Call)]
    names = {function.name for function in functions}
    assert len(names) == len(functions) >= 2
    assert set(called) <= names
    assert len(set(called)) == len(called) == min(8, len(names))

    spelled = [tuple(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) for name in names]
    counted = [len(trial.tokens) - trial.answer + place for place, counts in enumerate(trial.counts) if counts]
    assert len(trial.counts) == trial.answer
    assert counted[0] == len(trial.tokens) - trial.answer
    expected = []
    end = tuple(tokenizer("\n    total +=", add_special_tokens=False)["input_ids"])
    for place in range(len(trial.tokens)):
        if trial.tokens[max(0, place - len(end)) : place] != end:
            continue
        # A call begins here: which tokens could come next, with what is there already?
        said = ()
        while said not in spelled:
            possible = {name[len(said)] for name in spelled if name[: len(said)] == said}
            whole = [name for name in spelled if name[: len(said)] == said]
            token = trial.tokens[place + len(said)]
            assert token in possible
            if len(whole) == 1:
                expected.append(place + len(said))
            said += (token,)
    assert counted == expected


@made
@pytest.mark.parametrize("start", [(), (0,), (0, 3)], ids=str)
def test_texts_have_their_length_and_begin_as_texts_do(make, start):
    tokenizer = tiny_tokenizer()
    for length in (200, 333, 512):
        trial = make(tokenizer, length=length, seed=1, start=start)
        assert len(trial.tokens) == length
        assert trial.tokens[: len(start)] == start
        assert trial.tokens.count(0) == start.count(0)
        assert trial == make(tokenizer, length=length, seed=1, start=start)
        assert trial != make(tokenizer, length=length, seed=2, start=start)


@made
def test_what_has_no_room_is_refused(make):
    kind = make.__name__.removesuffix("_prompt")
    with pytest.raises(UsageError, match=rf"^64 tokens have no room for a text of the kind {kind}: raise --needle-"):
        make(tiny_tokenizer(), length=64, seed=0)


@pytest.mark.parametrize("make", [json_prompt, code_prompt])
def test_a_tokenizer_that_does_not_know_letters_is_refused(make):
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "the": 1, '"': 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    with pytest.raises(UsageError, match=r"different random words with the same tokens: leave \w+ out of --probes"):
        make(words, length=300, seed=0)


def test_passages_of_the_text_are_said_twice():
    text = torch.tensor(tiny_tokenizer()(TEXT * 3, add_special_tokens=False)["input_ids"])
    trials = passage_prompts(text, length=101, count=3, start=(0,))
    half = 50
    for trial, place in zip(trials, (0, (len(text) - half) // 2, len(text) - half), strict=True):
        assert trial.tokens == (0, *text[place : place + half].tolist() * 2)
        # The first token of the second time cannot be known.
        assert trial.answer == half - 1
    [alone] = passage_prompts(text, length=101, count=1)
    assert alone.tokens[:50] == tuple(text[:50].tolist())


def test_a_passage_that_the_text_does_not_hold_is_refused():
    with pytest.raises(UsageError, match="has 30 tokens, and a passage is to have 50: pass more text, lower --needle"):
        passage_prompts(torch.arange(30), length=100, count=2)
