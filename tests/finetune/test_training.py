"""``transmla finetune`` from a checkpoint to a better one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.factory import tiny_checkpoint
from tests.finetune.conftest import FEW, SIZES, loads, weights


def report_of(folder):
    return json.loads((folder / "transmla_finetune.json").read_text())


def changed(before, after):
    before, after = weights(before), weights(after)
    assert before.keys() == after.keys()
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: t.dtype for name, t in after.items()}
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("train_what", ["attention", "all", "lora"])
def test_no_steps_change_no_bit(train, converted, tmp_path, train_what):
    output = train(converted, tmp_path / "out", f"--max-steps 0 --train {train_what}")
    assert changed(converted, output) == set()
    assert (output / "config.json").read_bytes() == (converted / "config.json").read_bytes()


def test_a_few_steps_train_attention_and_nothing_else(train, converted, tmp_path):
    output = train(converted, tmp_path / "out", "--max-steps 12 --eval-steps 4")
    names = changed(converted, output)
    projections = {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert {name for name in names if "layernorm" not in name} == {
        f"model.layers.{layer}.self_attn.{projection}.weight" for layer in range(2) for projection in projections
    }
    # Where rows have grown, their norm's weight has, by a power of two.
    before, after = weights(converted), weights(output)
    assert all(name.endswith("kv_a_layernorm.weight") for name in names if "layernorm" in name)
    for name in before:
        if name.endswith("kv_a_layernorm.weight"):
            assert (after[name] / before[name]).unique().log2() in (0, 1)
    report = report_of(output)
    points = report["heldout"]
    assert [point["step"] for point in points] == [0, 4, 8, 12]
    # Found: 0.95.
    assert points[-1]["kl"] < 0.97 * points[0]["kl"]
    assert [point["num_tokens_seen"] for point in points] == [0, 512, 1024, 1536]
    assert report["best_step"] == min(points, key=lambda point: point["loss"])["step"]
    assert loads(output)


def test_what_is_written_measures_as_it_did_in_training(train, cli, pair, tmp_path, calibration_text):
    """Stock transformers, with the norm in place, gives the loss that the trainer reported for plain factors."""
    source, converted = pair
    output = train(converted, tmp_path / "out", "--max-steps 6 --eval-steps 3")
    result = cli("eval", source, output, "--dataset", calibration_text, "--window", 32, "--max-tokens", 512, "--json")
    measured = json.loads(result.stdout)["texts"][0]["scores"][1]
    reported = min(report_of(output)["heldout"], key=lambda point: point["loss"])
    # Found: 1e-7. The first sixteen sequences are those that are held out.
    assert measured["nll"] == pytest.approx(reported["nll"], rel=1e-5)
    assert measured["kl"] == pytest.approx(reported["kl"], rel=1e-3)


def test_the_output_has_these_files(train, converted, tmp_path):
    output = train(converted, tmp_path / "out", "--max-steps 2")
    assert {path.name for path in output.iterdir()} == {path.name for path in converted.iterdir()} | {
        "transmla_finetune.json",
        "transmla_finetune.yaml",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert "trained further by transmla" in (output / "README.md").read_text()


def test_the_recipe_gives_the_same_again(train, cli, converted, tmp_path):
    first = train(converted, tmp_path / "first", "--max-steps 3")
    result = cli("finetune", "--config", first / "transmla_finetune.yaml", "--output-dir", tmp_path / "again", "-q")
    assert result.exit_code == 2  # OUTPUT_DIR is an argument
    result = cli("finetune", converted, tmp_path / "again", "--config", first / "transmla_finetune.yaml", "-q")
    assert result.exit_code == 0, result.stderr
    assert changed(first, tmp_path / "again") == set()


@pytest.mark.parametrize("flags", ["--train all", "--train lora --lora-rank 8 --lora-alpha 8 --learning-rate 3e-3"])
def test_other_ways_to_train(train, converted, tmp_path, flags):
    output = train(converted, tmp_path / "out", f"--max-steps 24 --eval-steps 12 {flags}")
    points = report_of(output)["heldout"]
    assert points[-1]["kl"] < 0.97 * points[0]["kl"]
    names = changed(converted, output)
    if "all" in flags:
        assert names >= {name for name in weights(converted) if "layernorm" not in name}
    else:
        assert all(".self_attn." in name for name in names)
        assert sum("o_proj" in name for name in names) == 2
    assert loads(output)


def test_low_rank_changes_are_of_low_rank(train, converted, tmp_path):
    output = train(converted, tmp_path / "out", "--max-steps 4 --train lora --lora-rank 3")
    name = "model.layers.1.self_attn.q_proj.weight"
    change = weights(output)[name] - weights(converted)[name]
    values = torch.linalg.svdvals(change)
    assert values[2] > 100 * values[3]


def test_cross_entropy_without_a_teacher(train, converted, tmp_path):
    output = train(converted, tmp_path / "out", "--max-steps 12 --eval-steps 6 --teacher none")
    points = report_of(output)["heldout"]
    assert points[-1]["nll"] < points[0]["nll"] - 0.05
    assert {point["kl"] for point in points} == {0}
    assert points[0]["loss"] == points[0]["nll"]


def test_attention_outputs_can_be_matched(train, converted, tmp_path):
    plain = report_of(train(converted, tmp_path / "plain", "--max-steps 2"))["heldout"]
    matched = report_of(train(converted, tmp_path / "matched", "--max-steps 2 --attention-weight 1"))["heldout"]
    assert matched[0]["kl"] == pytest.approx(plain[0]["kl"])
    assert matched[0]["loss"] > plain[0]["loss"] + 0.01
    assert matched[-1]["loss"] < matched[0]["loss"]


def test_an_exact_conversion_has_nothing_to_match(train, cli, pair, tmp_path):
    source, _ = pair
    assert cli("convert", source, tmp_path / "mla", "--exact", "-q").exit_code == 0
    start = report_of(train(tmp_path / "mla", tmp_path / "out", "--max-steps 1 --attention-weight 1 --ce-weight 0"))
    # Found: 2e-6, on some processors -2e-9, which is float32's rounding of a divergence of zero.
    assert -1e-7 < start["heldout"][0]["loss"] < 1e-4


def test_the_stream_of_the_quantizable_profile_has_another_scale_and_is_matched_alike(
    train, cli, pair, tmp_path, calibration_text
):
    """Both profiles are the same model, and the second one's stream is a thousand times as large."""
    losses = []
    for profile in ("portable", "quantizable"):
        flags = ["--kv-ratio", "0.5", "--calibration", calibration_text, "--num-windows", 4, "--window", 32]
        output = tmp_path / profile
        assert cli("convert", pair[0], output, *flags, "--profile", profile, "-q").exit_code == 0
        start = report_of(
            train(output, tmp_path / f"{profile}-out", "--max-steps 1 --attention-weight 1 --ce-weight 0")
        )
        losses.append(start["heldout"][0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_probabilities_that_a_teacher_wrote_down(train, converted, tmp_path):
    computed, cached = (
        report_of(train(converted, tmp_path / name, f"--max-steps 6 --eval-steps 3 {flags}"))
        for name, flags in (("computed", ""), ("cached", "--teacher-top-k 401"))
    )
    for one, other in zip(computed["heldout"], cached["heldout"], strict=True):
        # Written in half precision.
        assert other["kl"] == pytest.approx(one["kl"], rel=2e-2)
        assert other["nll"] == pytest.approx(one["nll"], rel=1e-4)


def test_data_can_be_streamed(train, converted, tmp_path):
    output = train(converted, tmp_path / "out", "--max-steps 4 --streaming")
    report = report_of(output)
    assert report["num_sequences"] is None
    assert report["heldout"][-1]["kl"] < report["heldout"][0]["kl"]


def test_conversations(cli, converted, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is."}]}
        for n in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cli(
        "finetune", converted, tmp_path / "out", "--dataset", tmp_path / "chat.jsonl", "--window", 64,
        "--num-eval-windows", 2, "--max-steps", 2, "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert loads(tmp_path / "out")


@pytest.mark.parametrize("train_what", ["attention", "all", "lora"])
def test_a_source_can_be_trained_for_comparison(train, pair, tmp_path, train_what):
    source, _ = pair
    flags = "--max-steps 12 --eval-steps 6 --teacher none --learning-rate 3e-3"
    output = train(source, tmp_path / "out", f"{flags} --train {train_what}")
    points = report_of(output)["heldout"]
    assert points[-1]["nll"] < points[0]["nll"] - 0.02
    names = changed(source, output)
    assert any("embed" in name for name in names) == (train_what == "all")
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"


def test_the_card_keeps_the_base_model(train, converted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    card = (copy / "README.md").read_text()
    (copy / "README.md").write_text(card.replace("---\n", "---\nbase_model: org/source\n", 1))
    first = train(copy, tmp_path / "first", "--max-steps 1")
    second = train(first, tmp_path / "second", "--max-steps 1")
    assert (second / "README.md").read_text().startswith("---\nbase_model: org/source\n")
    (copy / "README.md").write_text("no card\n")
    third = train(copy, tmp_path / "third", "--max-steps 1")
    assert "base_model" not in (third / "README.md").read_text()


def test_half_precision_where_nothing_is_trained(train, cli, pair, tmp_path, calibration_text):
    """With products in bfloat16 the losses are near, and what comes out has the type that came in."""
    source, converted = pair
    flags = (*SIZES, *FEW, "--dtype", "bfloat16", "--calibration", calibration_text, "-q")
    assert cli("convert", source, tmp_path / "mla", *flags).exit_code == 0
    for number, checkpoint in enumerate((converted, tmp_path / "mla")):
        full = report_of(train(checkpoint, tmp_path / f"full-{number}", "--max-steps 4"))
        output = train(checkpoint, tmp_path / f"half-{number}", "--max-steps 4 --bf16")
        for one, other in zip(full["heldout"], report_of(output)["heldout"], strict=True):
            assert one["kl"] == pytest.approx(other["kl"], rel=0.05)
        assert changed(checkpoint, output)
    still = train(tmp_path / "mla", tmp_path / "still", "--max-steps 0 --bf16")
    assert changed(tmp_path / "mla", still) == set()


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
@pytest.mark.parametrize("train_what", ["attention", "all"])
def test_other_families(train, cli, tmp_path, calibration_text, family, train_what):
    source = tiny_checkpoint(tmp_path / "source", family=family)
    flags = (*SIZES, *FEW, "--calibration", calibration_text, "-q")
    assert cli("convert", source, tmp_path / "mla", *flags).exit_code == 0
    output = train(tmp_path / "mla", tmp_path / "out", f"--max-steps 6 --train {train_what}")
    points = report_of(output)["heldout"]
    assert points[-1]["loss"] < points[0]["loss"]
    assert loads(output)


def test_stored_types_stay(train, cli, pair, tmp_path, calibration_text):
    source, _ = pair
    flags = (*SIZES, *FEW, "--dtype", "bfloat16", "--calibration", calibration_text, "-q")
    assert cli("convert", source, tmp_path / "mla", *flags).exit_code == 0
    output = train(tmp_path / "mla", tmp_path / "out", "--max-steps 6")
    assert {tensor.dtype for tensor in weights(output).values()} == {torch.bfloat16}
    assert len(changed(tmp_path / "mla", output)) >= 8


def test_a_fitted_norm_is_trained(train, cli, pair, tmp_path, calibration_text):
    source, _ = pair
    flags = (*SIZES, *FEW, "--latent-norm", "fitted", "--calibration", calibration_text, "-q")
    assert cli("convert", source, tmp_path / "mla", *flags).exit_code == 0
    output = train(tmp_path / "mla", tmp_path / "out", "--max-steps 6")
    names = changed(tmp_path / "mla", output)
    assert "model.layers.0.self_attn.kv_a_layernorm.weight" in names
    norm = weights(output)["model.layers.0.self_attn.kv_a_layernorm.weight"]
    assert len(norm.unique()) > 2


def test_a_finetuned_model_can_be_finetuned_again(train, converted, tmp_path):
    first = train(converted, tmp_path / "first", "--max-steps 4")
    second = train(first, tmp_path / "second", "--max-steps 4")
    assert report_of(second)["heldout"][0]["nll"] == pytest.approx(report_of(first)["heldout"][-1]["nll"], rel=1e-5)
    assert loads(second)


def test_memory_is_saved_without_changing_the_result(train, converted, tmp_path):
    plain = train(converted, tmp_path / "plain", "--max-steps 3")
    saved = train(converted, tmp_path / "saved", "--max-steps 3 --gradient-checkpointing")
    first, second = weights(plain), weights(saved)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("more", ["", "--repeats 0.3 --hard-label-share 0.2"])
def test_accumulated_batches_are_one_batch(train, converted, tmp_path, more):
    """However many tokens each of them has to learn from."""
    one_batch = "--per-device-train-batch-size 8"
    several = "--per-device-train-batch-size 2 --gradient-accumulation-steps 4 --per-device-eval-batch-size 3"
    whole, parts = (
        report_of(train(converted, tmp_path / name, f"--max-steps 3 {more} {flags}"))["heldout"]
        for name, flags in (("whole", one_batch), ("parts", several))
    )
    for one, other in zip(whole, parts, strict=True):
        for value in ("nll", "loss", *(["repeat_nll"] if more else [])):
            assert one[value] == pytest.approx(other[value], rel=1e-5)


def test_the_models_that_are_compared_speak_alike(train, converted, tmp_path):
    output = train(converted, tmp_path / "out", "--max-steps 2")
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.kv_lora_rank == 24
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False).shape == (1, 6)
