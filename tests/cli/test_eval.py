import json
import subprocess
import sys

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import transmla.evaluate.run
from transmla.cli.eval import evaluate_models
from transmla.cli.views.evaluation import report_tables
from transmla.errors import UsageError
from transmla.evaluate.parts.cost import ModelReport
from transmla.evaluate.parts.perplexity import DataReport, TextReport
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.report.text_table import short_names
from transmla.evaluate.statistics import Bucket, TextScore
from transmla.records import Versions


def bucket(start, **values):
    return Bucket(start=start, stop=start + 512, num_positions=8000, nll=3.2, **values)


REPORT = EvalReport(
    models=(
        ModelReport(
            name="org/Source-Model-8B-Instruct",
            fingerprint="a" * 32,
            kv_bytes_per_token=131072,
            kv_numbers_per_token_layer=2048.0,
            kv_bytes_computed=131072,
            num_parameters=8_030_261_248,
        ),
        ModelReport(
            name="/somewhere/converted",
            fingerprint="b" * 32,
            kv_bytes_per_token=32768,
            kv_numbers_per_token_layer=512.0,
            kv_bytes_computed=32768,
            num_parameters=135_000,
        ),
    ),
    texts=(
        TextReport(
            data=DataReport(
                dataset="texts/wiki.txt",
                protocol="windows of 1024 tokens",
                num_tokens=16384,
                num_windows=16,
                num_positions=16368,
                sha256="0" * 64,
            ),
            scores=(
                TextScore(
                    model="org/Source-Model-8B-Instruct",
                    perplexity=18.2974,
                    nll=2.9068,
                    bits_per_byte=0.9154,
                    positions=(bucket(0), bucket(512)),
                ),
                TextScore(
                    model="/somewhere/converted",
                    perplexity=19.0123,
                    nll=2.9451,
                    bits_per_byte=0.9274,
                    excess_nll=-0.0000312,
                    excess_se=0.00412,
                    kl=0.04321,
                    top1_agreement=0.93187,
                    top5_agreement=0.8765,
                    positions=(bucket(0, excess_nll=0.0101, kl=0.1), bucket(512, excess_nll=0.0202, kl=0.1)),
                ),
            ),
        ),
    ),
    dtype="float32",
    device="cpu",
    versions=Versions(transmla="0", torch="0", transformers="0"),
)


@pytest.fixture
def run(monkeypatch):
    requests = []

    def evaluate(request, *, progress, tell):
        requests.append(request)
        return REPORT

    monkeypatch.setattr(transmla.evaluate.run, "evaluate", evaluate)
    app = typer.Typer()
    app.command()(evaluate_models)

    def run(*args):
        return CliRunner().invoke(app, args), requests[-1] if requests else None

    return run


def test_json_is_the_report_and_nothing_else(run):
    result, _ = run("m", "c", "--dataset", "a.txt", "--json")
    assert json.loads(result.stdout) == REPORT.model_dump(mode="json")


def test_flags_win_over_the_recipe(run, tmp_path):
    recipe = tmp_path / "eval.yaml"
    recipe.write_text("source: m\nconverted: [a, b]\ndataset: a.txt\nwindow: 8\nbatch_size: 3\n")
    _, request = run("--config", str(recipe), "--window", "16", "--max-tokens", "99")
    assert (request.source, request.converted, request.dataset) == ("m", ("a", "b"), ("a.txt",))
    assert (request.window, request.max_tokens, request.batch_size, request.dtype) == (16, 99, 3, "float32")


@pytest.mark.parametrize(
    ("args", "message"),
    [([], "SOURCE is missing"), (["m", "--dataset", "a.txt", "--dtype", "int8"], "--dtype: .*int8")],
)
def test_a_request_that_cannot_be_is_refused(run, args, message):
    result, request = run(*args)
    assert request is None
    with pytest.raises(UsageError, match=message):
        raise result.exception


@pytest.mark.parametrize("width", [80, 160])
def test_the_tables_fit_a_terminal(run, width):
    console = Console(width=width, record=True)
    console.print(*report_tables(REPORT), sep="\n")
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    parts = (
        "wiki.txt: 16,368 tokens in windows of 1024 tokens",
        "18.2974",
        "-3e-05 ±0.0041",
        "0.0432",
        "93.2%",
        "87.6%",
    )
    for part in (*parts, "0.9274", "512 to 1,023", "+0.0202", "131,072", "25.0%", "8.03B"):
        assert part in shown
    result, _ = run("m", "c", "--dataset", "a.txt")
    assert "19.0123" in result.stdout


def test_names_are_as_long_as_it_takes():
    assert short_names(["org/source", "/a/ours", "/b/rorope"]) == ["source", "ours", "rorope"]
    assert short_names(["source", "/a/ours", "/b/ours"]) == ["source", "a/ours", "b/ours"]
    assert short_names(["a/same", "a/same"]) == ["same", "same"]


def test_help_does_not_wait_for_pytorch():
    code = "import sys, transmla.cli.eval; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
