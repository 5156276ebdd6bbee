"""A table of sizes: what is compared, in what order, in one pass, and that it says what a conversion's plan says."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import tiny_checkpoint
from transmla.checkpoint import reader
from transmla.convert import SizesReport, SizesRequest, compare_sizes, excess, predict, size_table
from transmla.convert import plan as planning
from transmla.convert.run import prepare
from transmla.deepseek.sizes import MLASizes
from transmla.errors import UsageError

FEW = {"num_windows": 6, "num_heldout_windows": 2, "window": 32}
FLAGS = ("--num-windows", "6", "--num-heldout-windows", "2", "--window", "32")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"))


def asked(source, text, **choices):
    return SizesRequest(model=str(source), calibration=str(text), **{**FEW, **choices})


def changed(source, folder, change):
    """A copy of the source with ``change`` applied to every attention's weights, by name."""
    tiny_checkpoint(folder)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = change(name, tensor).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_sizes_are_in_order_and_larger_ones_are_predicted_to_lose_less(source, calibration_text):
    report = compare_sizes(asked(source, calibration_text))
    numbers = [row.kv_lora_rank + row.qk_rope_head_dim for row in report.sizes]
    assert numbers == [8, 10, 16, 22, 32, 42]
    assert [row.share for row in report.sizes] == [number / 64 for number in numbers]
    assert [row.kv_bytes_per_token for row in report.sizes] == [number * 2 * 4 for number in numbers]
    losses = [row.predicted_excess for row in report.sizes]
    assert losses == sorted(losses, reverse=True)
    for row in report.sizes:
        errors = [one.error for one in row.predictions]
        assert errors == sorted(errors)
        assert 1 <= len(errors) <= 3
        assert len({one.qk_rope_head_dim for one in row.predictions}) == len(errors)
        assert {one.kv_lora_rank + one.qk_rope_head_dim for one in row.predictions} == {
            row.kv_lora_rank + row.qk_rope_head_dim
        }
        best = row.predictions[0]
        assert (row.kv_lora_rank, row.qk_rope_head_dim) == (best.kv_lora_rank, best.qk_rope_head_dim)
        assert row.predicted_excess == pytest.approx(report.excess_factor * best.error**2)


def test_all_sizes_are_predicted_in_one_pass_over_the_source(source, calibration_text, monkeypatch):
    done = []
    for module, name in (
        *((planning, "open_model"), (planning, "fetch_weights"), (reader, "_read_all_headers")),
        *((predict, "read_layer"), (predict, "source_stream"), (size_table, "calibration_windows")),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=real, **k: (done.append(n), f(*a, **k))[1])
    report = compare_sizes(asked(source, calibration_text))
    assert sum(len(row.predictions) for row in report.sizes) > 10
    assert sorted(done) == sorted(
        [
            *("open_model", "fetch_weights", "_read_all_headers", "source_stream", "calibration_windows"),
            *["read_layer"] * 2,
        ]
    )


def test_a_row_is_what_the_plan_of_that_conversion_says(source, calibration_text, tmp_path):
    from transmla.convert import ConvertRequest

    request = asked(source, calibration_text, shares=(0.5,), engine=("mlx",), dtype="bfloat16")
    [row] = compare_sizes(request).sizes
    wanted = {name: getattr(request, name) for name in ("model", "calibration", "engine", "dtype", *FEW)}
    plan, _ = prepare(ConvertRequest(**wanted, output_dir=tmp_path / "out", kv_ratio=0.5))
    compared = {(one.kv_lora_rank, one.qk_rope_head_dim): one for one in plan.predictions}
    assert all(one == compared[one.kv_lora_rank, one.qk_rope_head_dim] for one in row.predictions)
    sizes = {"kv_lora_rank": row.kv_lora_rank, "qk_rope_head_dim": row.qk_rope_head_dim}
    assert row.flags == (
        *(f"--kv-lora-rank {row.kv_lora_rank}", f"--qk-rope-head-dim {row.qk_rope_head_dim}", "--engine mlx"),
        *(f"--calibration {calibration_text}", "--num-windows 6", "--window 32", "--num-heldout-windows 2"),
        "--dtype bfloat16",
    )
    plan, _ = prepare(ConvertRequest(**wanted, output_dir=tmp_path / "out", **sizes), predict=False)
    for field in ("share", "kv_bytes_per_token", "engines", "qk_nope_head_dim", "v_head_dim", "peak_memory_bytes"):
        assert getattr(row, field) == getattr(plan.summary, field), field


@pytest.mark.parametrize(("without", "best"), [("k_proj", 4), ("v_proj", 16)])
def test_the_best_split_is_the_one_that_the_model_needs(source, calibration_text, tmp_path, without, best):
    """Without keys all is for the values, which are latent; with next to no values, all is for keys, which turn."""

    def change(name, tensor):
        if f"{without}.weight" not in name:
            return tensor
        # Values of one direction take one number of the latent.
        return torch.zeros_like(tensor) if without == "k_proj" else tensor[:1].expand(len(tensor), -1)

    model = changed(source, tmp_path / "model", change)
    [row] = compare_sizes(asked(model, calibration_text, shares=(0.5,))).sizes
    assert sorted(one.qk_rope_head_dim for one in row.predictions) == [4, 8, 16]
    assert row.qk_rope_head_dim == best


def test_the_splits_nearest_to_the_plain_rule_are_compared():
    splits = [MLASizes(96 + 32 - rope, rope, 8, 8) for rope in (32, 8, 16, 64)]
    assert [split.qk_rope_head_dim for split in size_table.nearest_splits(splits)] == [32, 16, 64]
    assert size_table.nearest_splits(splits[:1]) == (splits[0],)


def test_shares_that_cannot_be_met_are_told_or_refused(source, calibration_text):
    told = []
    report = compare_sizes(asked(source, calibration_text, shares=(0.5, 0.01)), tell=told.append)
    assert len(report.sizes) == 1
    assert told == [
        "A share of 0.01 is left out: --kv-ratio 0.01 leaves 0 of 64 numbers per token, too few for a rotary key and a "
        "latent."
    ]
    with pytest.raises(UsageError, match=r"None of --shares is possible; of 0\.02 transmla convert says: --kv-ratio"):
        compare_sizes(asked(source, calibration_text, shares=(0.01, 0.02)))
    with pytest.raises(UsageError, match=r"^Sizes are compared on a text: pass --calibration FILE\.$"):
        compare_sizes(asked(source, "none"))


def test_shares_that_lead_to_one_size_are_one_row(calibration_text, tmp_path):
    shape = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "hidden_size": 64}
    wide = tiny_checkpoint(tmp_path / "wide", num_hidden_layers=1, **shape)
    report = compare_sizes(asked(wide, calibration_text, shares=(0.55, 0.6, 0.65), engine="vllm"))
    assert [(row.kv_lora_rank, row.qk_rope_head_dim) for row in report.sizes] == [(256, 64)]
    assert "vllm" in report.sizes[0].engines
    # Without the engine its heads would not be padded.
    assert "--engine vllm" in report.sizes[0].flags


class TestCommand:
    def test_json_is_the_report_and_nothing_else(self, cli, source, calibration_text):
        result = cli("sizes", source, "--calibration", calibration_text, *FLAGS, "--shares", "0.5,0.25", "-q", "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        report = SizesReport.model_validate_json(result.stdout)
        assert json.loads(result.stdout) == json.loads(report.model_dump_json())
        assert [row.share for row in report.sizes] == [0.25, 0.5]
        assert (report.num_windows, report.window, report.datasets) == (8, 32, (str(calibration_text),))

    def test_the_table_fits_80_columns_and_says_how_far_it_is_to_be_trusted(self, cli, source, calibration_text):
        result = cli("sizes", source, "--calibration", calibration_text, *FLAGS, "--shares", "0.5", "--shares", "1")
        assert result.exit_code == 0
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert "Comparing sizes" in result.stderr
        shown = " ".join(result.stdout.split())
        assert excess.how_far_off() in shown
        assert "transmla convert MODEL FOLDER --kv-lora-rank" in shown
        assert "predicted on 8 windows of 32 tokens" in shown

    def test_an_output_of_an_earlier_conversion_is_not_in_the_way(self, cli, source, calibration_text, monkeypatch):
        monkeypatch.chdir(source.parent)
        (source.parent / f"{source.name}-mla").mkdir()
        result = cli("sizes", source, "--calibration", calibration_text, *FLAGS, "--shares", "0.5", "-q")
        assert result.exit_code == 0
        assert not list((source.parent / f"{source.name}-mla").iterdir())

    @pytest.mark.parametrize("ending", ["png", "svg"])
    def test_a_plot_is_drawn(self, cli, source, calibration_text, tmp_path, ending):
        pytest.importorskip("matplotlib")
        plot = tmp_path / f"sizes.{ending}"
        shares = ("--shares", "0.5,0.25,0.05")
        result = cli("sizes", source, "--calibration", calibration_text, *FLAGS, *shares, "-q", "--plot", plot)
        assert result.exit_code == 0, result.stderr
        assert plot.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")
        assert plot.stat().st_size > 10_000

    def test_a_missing_matplotlib_is_said_before_the_work(self, cli, source, calibration_text, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = cli("sizes", source, "--calibration", calibration_text, "--plot", "sizes.png")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == "Error: --plot needs matplotlib: pip install 'transmla[plots]', or drop --plot.\n"

    @pytest.mark.parametrize("shares", ["0", "1.5", "half", "0.5,"])
    def test_shares_that_are_none_are_refused(self, cli, source, calibration_text, shares):
        result = cli("sizes", source, "--calibration", calibration_text, "--shares", shares)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Error: The request is not valid: --shares: ")
