import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from transmla.cli.app import app
from transmla.generate.report import GenerationReport

FEW = ("--max-new-tokens", "12", "--device", "cpu")


@pytest.fixture(scope="module")
def expected(exact_pair):
    runner = CliRunner()
    result = runner.invoke(app, ["generate", str(exact_pair[1]), "A mill stood", *FEW, "--json", "-q"])
    assert (result.exit_code, result.stderr) == (0, "")
    return GenerationReport.model_validate_json(result.stdout)


def test_stdout_is_the_text(cli, exact_pair, expected):
    result = cli("generate", exact_pair[1], "A mill stood", *FEW, "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected.text + "\n", "")


def test_the_text_comes_piece_by_piece(cli, exact_pair, expected, monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *words, **options: pieces.append((words, options)))
    cli("generate", exact_pair[1], "A mill stood", *FEW, "-q")
    shown = [words[0] for words, options in pieces if options == {"end": "", "flush": True}]
    assert len(shown) > 1
    assert "".join(shown) == expected.text


def test_the_measurements_go_to_stderr(cli, exact_pair):
    result = cli("generate", exact_pair[1], "A mill stood", *FEW)
    assert re.search(
        r"^DeepseekV3ForCausalLM \(absorbed\): 11 \+ 12 tokens, the first after \d+\.\d\d s, \d+\.\d tokens/s; "
        r"it caches 64 numbers per token and layer, 512 bytes a token\.$",
        result.stderr,
        re.MULTILINE,
    )
    result = cli("generate", exact_pair[1], "A mill stood", *FEW, "--stock")
    assert "DeepseekV3ForCausalLM (expanded): " in result.stderr


def test_json_has_the_text_and_what_it_took(expected):
    assert (expected.num_prompt_tokens, expected.num_new_tokens, expected.form) == (11, 12, "absorbed")
    assert expected.prompt == "user: A mill stood\n"


@pytest.mark.parametrize("typed", ["A mill stood\n", "A mill stood"])
def test_a_dash_reads_standard_input(exact_pair, expected, typed):
    result = CliRunner().invoke(app, ["generate", str(exact_pair[1]), "-", *FEW, "-q"], input=typed)
    assert (result.exit_code, result.stdout) == (0, expected.text + "\n")


def test_flags_arrive(cli, exact_pair):
    flags = ("--temperature", "0.7", "--top-p", "0.9", "--top-k", "20", "--repetition-penalty", "1.1", "--seed", "3")
    report = json.loads(cli("generate", exact_pair[0], "A mill", *FEW, *flags, "--json", "-q").stdout)
    assert report["sampled"]
    again = json.loads(cli("generate", exact_pair[0], "A mill", *FEW, *flags, "--json", "-q").stdout)
    assert report["text"] == again["text"]
    flags = ("--no-do-sample", "--no-chat-template", "--dtype", "bfloat16")
    report = json.loads(cli("generate", exact_pair[0], "A mill", *FEW, *flags, "--json", "-q").stdout)
    assert (report["sampled"], report["prompt"], report["dtype"]) == (False, "A mill", "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, r"PROMPT is missing\."),
        (("",), 2, "The prompt is empty"),
        (("hi", "--temperature", "-1"), 2, r"--temperature: .* \(found -1\.0\)"),
        (("hi", "--top-p", "1.5"), 2, r"--top-p: .* \(found 1\.5\)"),
        (("hi", "--max-new-tokens", "0"), 2, r"--max-new-tokens: .* \(found 0\)"),
        (("hi", "--temperature", "0", "--top-k", "5"), 2, "Nothing is drawn .* or drop --top-k"),
        (("hi", "--no-chat-template", "--system", "x"), 2, "--system needs a chat template"),
        (("hi", "--dtype", "int8"), 2, r"--dtype: .* \(found 'int8'\)"),
        (("hi", "--device", "abacus"), 2, "The device 'abacus' cannot be used here"),
        (("hi", "--gguf-file", "absent.gguf"), 1, "has no file absent.gguf"),
        (("word " * 600,), 2, r"The prompt has \d+ tokens and the model a context of 512, the answer included"),
    ],
)
def test_refusals(cli, exact_pair, arguments, code, message):
    result = cli("generate", exact_pair[1], *arguments, "-q")
    assert (result.exit_code, result.stdout) == (code, "")
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
    assert "not expected" not in result.stderr


def test_no_such_model(cli, tmp_path):
    result = cli("generate", tmp_path / "absent", "hi")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "There is no folder" in result.stderr


def test_standard_input_that_is_no_text(exact_pair):
    done = subprocess.run(
        [sys.executable, "-m", "transmla", "generate", str(exact_pair[1]), "-"],
        input=b"\xff\xfe",
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"Error: The prompt on standard input is not UTF-8 text.\n"
