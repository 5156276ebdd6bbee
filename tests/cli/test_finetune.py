"""What people and programs see of ``transmla finetune``."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from tests.factory import tiny_checkpoint
from transmla.cli.views.training import report_table
from transmla.finetune.report import FinetuneReport, HeldoutPoint

FEW = ["--window", "32", "--num-eval-windows", "8", "--per-device-train-batch-size", "4", "--max-steps", "2"]


@pytest.fixture(scope="module")
def converted(cli, tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    source = tiny_checkpoint(root / "source")
    assert cli("convert", source, root / "mla", "--exact", "-q").exit_code == 0
    return root / "mla"


@pytest.fixture
def refuses(cli, converted, tmp_path, calibration_text):
    def refuses(code, message, *flags, checkpoint=converted, dataset=calibration_text):
        result = cli("finetune", checkpoint, tmp_path / "out", "--dataset", dataset, *FEW, *flags, "-q")
        assert result.exit_code == code, result.output
        assert re.search(message, result.stderr), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert "not expected" not in result.stderr
        assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]

    return refuses


@pytest.mark.parametrize(
    ("code", "message", "flags"),
    [
        (2, "--teacher-top-k has the teacher read all data before", ["--streaming", "--teacher-top-k", "4"]),
        (2, "--attention-weight needs the teacher at every step", ["--attention-weight", "1", "--teacher-top-k", "4"]),
        (2, "--teacher none leaves cross-entropy alone: drop --ce-weight", ["--teacher", "none", "--ce-weight", "0.5"]),
        (2, "need a teacher, and --teacher is none", ["--teacher", "none", "--attention-weight", "1"]),
        (2, "--window 600 is longer than the model's context of 512", ["--window", "600"]),
        (2, "not take these arguments: .*wavy", ["--lr-scheduler-type", "wavy"]),
        (2, "not take these arguments: .*adamzz", ["--optim", "adamzz"]),
        (2, "not take these arguments: .*nobody", ["--report-to", "nobody"]),
        (2, "not take these arguments: .*ensor.?oard", ["--report-to", "tensorboard"]),
        (2, "--train: .*'half'", ["--train", "half"]),
        (2, "--max-shard-size '5 pounds' is not a size", ["--max-shard-size", "5 pounds"]),
        (1, "8000 are to be held out: pass more text, or lower --num-eval-windows", ["--num-eval-windows", "8000"]),
        (1, "There is no folder", ["--teacher", "./nowhere"]),
        (1, "There is no file .*nothing.txt", ["--eval-dataset", "nothing.txt"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(refuses, code, message, flags):
    refuses(code, message, *flags)


def test_a_stream_needs_an_end(cli, converted, tmp_path, calibration_text):
    result = cli("finetune", converted, tmp_path / "out", "--dataset", calibration_text, "--streaming", "-q")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--streaming needs --max-steps" in result.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_while_it_trains(cli, converted, tmp_path, workers):
    """Far into a stream, perhaps by a worker: still one sentence, and what was trained is kept."""
    rows = [json.dumps({"text": f"The wheel turned {number} times before winter."}) for number in range(4000)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"text": ']) + "\n")
    (tmp_path / "recipe.yaml").write_text(f"training_arguments: {{dataloader_num_workers: {workers}}}\n")
    result = cli(
        "finetune", converted, tmp_path / "out", "--dataset", tmp_path / "rows.jsonl", *FEW[:4], "--streaming",
        "--max-steps", 300, "--per-device-train-batch-size", 8, "--config", tmp_path / "recipe.yaml", "-q",
    )  # fmt: skip
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "not expected" not in result.stderr
    assert "rows.jsonl" in result.stderr


def test_a_source_has_no_source(refuses, converted):
    refuses(2, "does not say what it was converted from", checkpoint=converted.parent / "source")


def test_a_source_that_is_gone_is_named(refuses, converted, tmp_path):
    checkpoint = tmp_path / "copy"
    checkpoint.mkdir()
    for path in converted.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    recipe = checkpoint / "transmla_recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace(str(converted.parent / "source"), "/gone"))
    refuses(1, "The source that .* was converted from cannot be opened .* --teacher", checkpoint=checkpoint)
    recipe.write_text("model: [1]\n")
    refuses(1, "does not name the model that was converted", checkpoint=checkpoint)
    recipe.unlink()
    refuses(2, "does not say what it was converted from", checkpoint=checkpoint)


def test_a_teacher_of_other_tokens_is_refused(refuses, tmp_path):
    other = tiny_checkpoint(tmp_path / "teacher")
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second = (token for token, number in vocabulary.items() if number in (50, 51))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    refuses(1, r"has another tokenizer \(token 50 is .* there and .* here\)", "--teacher", other)


def test_a_teacher_without_a_row_for_a_token_is_refused(refuses, tmp_path):
    other = tiny_checkpoint(tmp_path / "teacher", vocab_size=300)
    refuses(1, "has 300 embeddings, and none for token 300", "--teacher", other)


@pytest.mark.parametrize("num_rows", [395, 480])
def test_a_padded_teacher_says_once_what_it_teaches(cli, converted, tmp_path, calibration_text, num_rows):
    other = tiny_checkpoint(tmp_path / "teacher", vocab_size=num_rows)
    arguments = ["finetune", converted, tmp_path / "out", "--dataset", calibration_text, *FEW, "--teacher", other, "-q"]
    shared = min(num_rows, 401)
    plan = json.loads(cli(*arguments, "--dry-run", "--json").stdout)
    assert plan["num_shared_tokens"] == shared
    result = cli(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count(f"it teaches over the {shared} tokens that they share") == 1
    assert json.loads(result.stdout)["num_shared_tokens"] == shared


def test_arguments_of_a_recipe_that_trainer_does_not_know(refuses, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("training_arguments: {colour: red}\n")
    refuses(2, "Trainer does not take these arguments: .*colour", "--config", recipe)
    recipe.write_text("training_arguments: {seed: 4}\n")
    refuses(2, "training_arguments: seed is --seed here", "--config", recipe)


def test_a_dry_run_tells_what_would_not_be_learnt(cli, converted, tmp_path):
    rows = [{"text": f"The wheel turned {number} times before winter.", "id": number} for number in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": None}]))
    result = cli("finetune", converted, tmp_path / "out", "--dataset", tmp_path / "rows.jsonl", *FEW, "--dry-run", "-q")
    assert result.exit_code == 0, result.stderr
    assert "1 of 401 rows hold nothing in text; the columns id are not read." in result.stderr


def test_a_dry_run_reads_no_weight(cli, converted, tmp_path, calibration_text):
    result = cli(
        "finetune", converted, tmp_path / "out", "--dataset", calibration_text, *FEW, "--dry-run", "--json", "-q"
    )
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert (plan["steps"], plan["tokens_per_step"]) == (2, 128)
    assert plan["memory"]["peak"] > plan["memory"]["trained"] == 4 * plan["num_trained_parameters"]
    assert list(tmp_path.iterdir()) == []


def test_tables_fit_80_columns(cli, converted, tmp_path, calibration_text):
    result = cli("finetune", converted, tmp_path / "out", "--dataset", calibration_text, *FEW, "--dry-run", "-q")
    assert result.exit_code == 0
    assert "Peak memory" in result.stdout
    point = HeldoutPoint(
        step=123_456, num_tokens_seen=12_345_678_901, loss=1.5, nll=2.5, perplexity=12345.6789, kl=0.1234, seconds=1e6
    )
    report = FinetuneReport(
        checkpoint="mla", teacher="source", num_parameters=1, num_trained_parameters=1, num_sequences=1,
        num_heldout_sequences=1, window=8, sha256="", steps=1, best_step=123_456, heldout=(point,), training=(),
        num_processes=1, request={}, versions={},
    )  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report_table(report))
    text = console.export_text()
    assert "12345.6789" in text
    assert "best" in text
    assert "weights that came in" not in text


@pytest.mark.parametrize(("losses", "said"), [((1.5, 1.6), True), ((1.5, 1.4), False), ((1.5,), False)])
def test_a_training_that_gained_nothing_says_so(losses, said):
    points = tuple(
        HeldoutPoint(step=10 * n, num_tokens_seen=n, loss=loss, nll=2.5, perplexity=12.0, kl=0.1, seconds=1.0)
        for n, loss in enumerate(losses)
    )
    report = FinetuneReport(
        checkpoint="mla", teacher="source", num_parameters=1, num_trained_parameters=1, num_sequences=1,
        num_heldout_sequences=1, window=8, sha256="", steps=points[-1].step,
        best_step=min(points, key=lambda point: point.loss).step, heldout=points, training=(), num_processes=1,
        request={}, versions={},
    )  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report_table(report))
    text = console.export_text()
    assert ("weights that came in" in " ".join(text.split())) == said
    assert max(map(len, text.splitlines())) <= 80


def test_a_curve_is_drawn(cli, converted, tmp_path, calibration_text):
    arguments = ["finetune", converted, tmp_path / "out", "--dataset", calibration_text, *FEW, "-q"]
    assert cli(*arguments, "--plot", tmp_path / "curve.svg").exit_code == 0
    text = (tmp_path / "curve.svg").read_text()
    assert text.startswith("<?xml")
    assert cli(*arguments, "--plot", tmp_path / "curve.txt", "--overwrite").exit_code == 2


def test_progress_and_measurements_are_told_on_stderr(cli, converted, tmp_path, calibration_text):
    result = cli("finetune", converted, tmp_path / "out", "--dataset", calibration_text, *FEW, "--json")
    assert json.loads(result.stdout)["steps"] == 2
    assert "held out: perplexity" in result.stderr
    assert "Training" in result.stderr


def test_the_teacher_s_type_is_a_word(cli, converted, tmp_path, calibration_text):
    arguments = ["finetune", converted, tmp_path / "out", "--dataset", calibration_text, *FEW, "--json", "-q"]
    result = cli(*arguments, "--teacher-dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    # The model was written exactly as its teacher is; rounded, the teacher is another one.
    assert json.loads(result.stdout)["heldout"][0]["kl"] > 1e-7
