"""Recipes that come with the package: found by name, listed, and copied; and the spellings of earlier releases."""

from __future__ import annotations

import json

import pytest
import yaml

from transmla.config import REQUESTS, ConvertRequest, EvalRequest
from transmla.config.recipes import find_recipe, shipped_recipes
from transmla.old_names import FIELDS, VALUES


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not name.startswith("accelerate/")])
def test_a_shipped_recipe_is_found_by_its_name(name):
    command, _, short = name.partition("/")
    path = find_recipe(short, command)
    assert path == find_recipe(name, command) == shipped_recipes()[name]
    request = REQUESTS[command]
    given = {"model": "m", "source": "m", "checkpoint": "m", "output_dir": "o", "dataset": ("d",)}
    recipe = yaml.safe_load(path.read_text())
    missing = {key: value for key, value in given.items() if key in request.model_fields and key not in recipe}
    assert request.build(recipe=path, flags=missing)


def test_a_recipe_of_another_name_is_refused(cli):
    result = cli("convert", "MODEL", "OUTPUT", "--config", "thrid")
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: --config thrid is neither a file nor a shipped recipe; shipped for convert: exact, healed, rorope, "
        "third, vllm.\n"
    )


def test_recipes_are_listed_and_copied(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = json.loads(cli("recipes", "--json").stdout)
    assert set(listed) == set(shipped_recipes())
    assert all(text.endswith(".") for text in listed.values())
    assert "convert/third" in cli("recipes").stdout
    assert cli("recipes", "third").stdout == "third.yaml\n"
    assert (tmp_path / "third.yaml").read_text() == shipped_recipes()["convert/third"].read_text()
    again = cli("recipes", "convert/third", "third.yaml")
    assert (again.exit_code, again.stderr) == (1, "Error: third.yaml exists already: choose another name.\n")
    unknown = cli("recipes", "forth")
    assert unknown.exit_code == 2
    assert "There is no recipe 'forth': take one of " in unknown.stderr


def test_every_old_name_stands_for_a_field_that_is_there():
    requests = {request.__name__: request for request in REQUESTS.values()}
    for owner, names in FIELDS.items():
        if owner in requests:
            assert set(names.values()) <= set(requests[owner].model_fields)
            assert not set(names) & set(requests[owner].model_fields)


def test_old_flags_and_old_recipes_say_the_same_as_new_ones(tmp_path):
    old = tmp_path / "old.yaml"
    old.write_text("contexts: [160]\nnum_depths: 2\nnum_trials: 3\nspeed_contexts: [64]\nsource: s\n")
    new = EvalRequest(source="s", needle_lengths=(160,), needle_depths=2, needle_trials=3, bench_contexts=(64,))
    assert EvalRequest.build(recipe=old, flags={}) == new
    old.write_text("method: complex\nlatent_norm: live\nbiases: fold\n")
    given = {"model": "m", "output_dir": tmp_path}
    expected = ConvertRequest(**given, method="fitted", latent_norm="fitted", biases="merge")
    assert ConvertRequest.build(recipe=old, flags=given) == expected
    words = {field: old for field, words in VALUES["ConvertRequest"].items() for old in words}
    assert ConvertRequest.build(recipe=None, flags={**given, **words}) == expected


def test_old_flags_are_taken_by_the_command_line_and_not_shown(cli, exact_pair, tmp_path):
    _, converted = exact_pair
    old = cli("generate", converted, "Hello", "--stock", "--max-new-tokens", "2", "--json")
    new = cli("generate", converted, "Hello", "--no-absorb", "--max-new-tokens", "2", "--json")
    assert json.loads(old.stdout)["form"] == json.loads(new.stdout)["form"] == "expanded"
    assert json.loads(old.stdout)["text"] == json.loads(new.stdout)["text"]
    assert "--stock" not in cli("generate", "--help").stdout
    both = tmp_path / "both.yaml"
    both.write_text("contexts: [160]\nneedle_lengths: [160]\n")
    assert "contexts" in cli("eval", "SOURCE", "--config", both).stderr


def test_what_a_recipe_asks_for_a_flag_can_switch_off(cli, tmp_path):
    recipe = tmp_path / "exact.yaml"
    recipe.write_text("exact: true\n")
    flags = {"model": "m", "output_dir": "o"}
    assert ConvertRequest.build(recipe=recipe, flags=flags).exact
    assert not ConvertRequest.build(recipe=recipe, flags={**flags, "exact": False}).exact
    assert "--no-exact" in cli("convert", "--help").stdout
