"""Help comes at once, says something about everything, and takes both spellings."""

import subprocess
import sys

import click
import pytest
import typer

import transmla
import transmla.convert.run
from transmla.cli.app import app
from transmla.config import REQUESTS

COMMANDS = typer.main.get_command(app).commands

# Runs the command in a fresh interpreter and fails if it has imported what takes seconds.
PROBE = """
import sys
from transmla.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as left:
    assert not left.code, left.code
heavy = {"torch", "transformers", "datasets", "safetensors", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_every_command_is_here():
    assert set(COMMANDS) == {*REQUESTS, "recipes"}


@pytest.mark.parametrize("arguments", [[], *([name] for name in REQUESTS)], ids=lambda words: " ".join(words) or "root")
def test_help_does_not_wait_for_pytorch(arguments):
    result = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments, "--help"], capture_output=True, encoding="utf-8", check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    for name in REQUESTS if not arguments else ["Usage", "--help"]:
        assert name in result.stdout


@pytest.mark.parametrize("name", REQUESTS)
def test_every_field_has_a_flag_and_one_description(name):
    parameters = {parameter.name: parameter for parameter in COMMANDS[name].params}
    for field, info in REQUESTS[name].model_fields.items():
        assert info.description
        if info.description.endswith("; in a recipe only."):
            assert field not in parameters
            continue
        assert parameters[field].help.startswith(info.description)
        assert parameters[field].help == REQUESTS[name].describe(field)
    for parameter in parameters.values():
        assert parameter.help.strip().endswith((".", ")")), parameter.name
        # Not given is None: a default of the command line would win over the recipe.
        assert parameter.name not in REQUESTS[name].model_fields or parameter.default is None


@pytest.mark.parametrize("name", REQUESTS)
def test_flags_are_shown_with_hyphens(name):
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            assert not [option for option in parameter.opts if "_" in option]


@pytest.mark.parametrize("flag", ["--kv-lora-rank", "--kv_lora_rank"])
def test_underscores_are_taken_for_hyphens(cli, monkeypatch, flag):
    requests = []

    def plan(request, **_):
        requests.append(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(transmla.convert.run, "plan_conversion", plan)
    cli("convert", "source", "target", flag, 48, "--qk_rope-head_dim", 16, "--dry_run")
    [request] = requests
    assert (request.kv_lora_rank, request.qk_rope_head_dim) == (48, 16)


def test_the_version_is_the_package_s(cli):
    result = cli("--version")
    assert (result.exit_code, result.output) == (0, transmla.__version__ + "\n")


def test_no_arguments_show_the_help_and_are_a_usage_error(cli):
    result = cli()
    assert result.exit_code == 2
    assert "Usage" in result.output


def test_an_unknown_flag_is_a_usage_error(cli):
    result = cli("convert", "source", "target", "--kv-lora")
    assert result.exit_code == 2
    assert "No such option" in result.output
