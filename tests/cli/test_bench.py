import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from transmla.bench.report import BenchCell, BenchModel, BenchReport
from transmla.cli.views.bench import bench_table
from transmla.records import Versions

FEW = ("--contexts", "24,40", "--num-new-tokens", "4", "--num-rounds", "1", "--device", "cpu", "-q")


def cell(context, form, problem=None, batch_size=64):
    place = {"model": "/models/Some-Model-8B-Instruct-mla-512-64", "form": form, "context": context}
    if problem:
        return BenchCell(**place, batch_size=batch_size, problem=problem)
    return BenchCell(
        **place,
        batch_size=batch_size,
        first_token_rounds=(123.456,),
        decode_rounds=(1.0,),
        seconds_to_first_token=123.456,
        decode_tokens_per_second=12345.678,
        first_token_speedup=0.987,
        decode_speedup=12.345,
        cache_bytes=123_456_789_012,
        peak_bytes_first_token=223_456_789_012,
        peak_bytes_decode=1,
    )


REPORT = BenchReport(
    models=tuple(
        BenchModel(
            name="/models/Some-Model-8B-Instruct-mla-512-64",
            architecture="DeepseekV3ForCausalLM",
            form=form,
            num_parameters=1,
            weight_bytes=4,
        )
        for form in ("expanded", "absorbed")
    ),
    cells=(
        cell(4096, "expanded"),
        cell(4096, "absorbed"),
        cell(131072, "expanded", "out of memory"),
        cell(131072, "absorbed"),
    ),
    num_new_tokens=32,
    num_rounds=1,
    seed=0,
    dtype="bfloat16",
    device="cuda",
    machine="NVIDIA H100 80GB HBM3",
    num_threads=16,
    versions=Versions(transmla="0", torch="0", transformers="0"),
)


def test_json_is_the_report_and_nothing_else(cli, exact_pair):
    result = cli("bench", *exact_pair, *FEW, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report = BenchReport.model_validate_json(result.stdout)
    assert len(report.cells) == 2 * 3
    assert {cell.problem for cell in report.cells} == {None}


def test_a_source_alone_is_measured(cli, exact_pair):
    result = cli("bench", exact_pair[0], *FEW, "--json")
    assert [cell["form"] for cell in json.loads(result.stdout)["cells"]] == ["expanded", "expanded"]


def test_the_table_names_forms_and_contexts(cli, exact_pair):
    result = cli("bench", *exact_pair, *FEW)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("4 new tokens after random ones, float32, cpu (")
    assert result.stdout.count("absorbed") == 2
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_table_fits_a_narrow_terminal():
    console = Console(width=80, record=True)
    console.print(bench_table(REPORT))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for part in ("131,072", "12,346", "12.35", "223,457", "out of memory", "absorbed"):
        assert part in text


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_drawn(cli, exact_pair, tmp_path, ending):
    picture = tmp_path / f"bench.{ending}"
    result = cli("bench", *exact_pair, *FEW, "--batch-sizes", "1", "--batch-sizes", "2", "--plot", picture)
    assert (result.exit_code, result.stderr) == (0, "")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(data) > 10_000


def test_what_did_not_fit_is_left_out_of_the_picture(tmp_path):
    from transmla.bench.plot import plot_bench

    plot_bench(REPORT, tmp_path / "bench.png")
    everything_failed = REPORT.model_copy(update={"cells": (cell(4096, "expanded", "out of memory"),)})
    plot_bench(everything_failed, tmp_path / "nothing.png")
    assert {path.name for path in tmp_path.iterdir()} == {"bench.png", "nothing.png"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--contexts", "many"), 2, r"--contexts: .* \(found 'many'\)"),
        (("--contexts", "512,"), 2, r"--contexts: .* \(found ''\)"),
        (("--contexts", "513"), 2, r"a context of 512 tokens: lower --contexts, which is 513"),
        (("--batch-sizes", "0"), 2, r"--batch-sizes: .* \(found '0'\)"),
        (("--num-rounds", "0"), 2, r"--num-rounds: .* \(found 0\)"),
        (("--contexts", "32"), 2, "A context of 32 tokens has no room for a prompt and 32 new tokens"),
        (("--plot", "bench.docx"), 2, r"--plot bench.docx has no ending of a picture: write \.png, \.svg or \.pdf"),
        (("--plot", "absent/bench.png"), 1, "There is no folder .*absent to write --plot bench.png to: create it"),
        (("--device", "abacus"), 2, "The device 'abacus' cannot be used here"),
    ],
)
def test_refusals(cli, exact_pair, arguments, code, message):
    result = cli("bench", *exact_pair, "-q", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(result.stderr)
    assert "not expected" not in result.stderr


def test_a_missing_matplotlib_is_said_before_the_work(cli, exact_pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli("bench", *exact_pair, "--plot", "bench.png")
    assert result.exit_code == 2
    assert result.stderr == "Error: --plot needs matplotlib: pip install 'transmla[plots]', or drop --plot.\n"
    assert not Path("bench.png").exists()


def test_a_source_is_needed(cli):
    result = cli("bench")
    assert (result.exit_code, result.stderr) == (2, "Error: The request is not valid: SOURCE is missing.\n")


def test_a_recipe_is_read_and_flags_win(cli, exact_pair, tmp_path):
    source, converted = exact_pair
    recipe = tmp_path / "bench.yaml"
    recipe.write_text(f"source: {source}\nconverted: [{converted}]\ncontexts: [16, 20]\nnum_new_tokens: 4\n")
    result = cli("bench", "--config", recipe, "--contexts", "12", "--num-rounds", "1", "--json", "-q")
    report = BenchReport.model_validate_json(result.stdout)
    assert {cell.context for cell in report.cells} == {12}
    assert len(report.cells) == 3
