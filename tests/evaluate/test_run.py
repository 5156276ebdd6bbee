import hashlib
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from transmla.config import EvalRequest
from transmla.errors import CheckpointError, DataError, UsageError
from transmla.evaluate.report import EvalReport
from transmla.evaluate.run import evaluate
from transmla.evaluate.scores import measure_agreement


@pytest.fixture(scope="module")
def folders(tmp_path_factory, llama, deepseek, tokenizer, text):
    root = tmp_path_factory.mktemp("models")
    for name, model in (("source", llama), ("converted", deepseek)):
        model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "source")
    (root / "text.txt").write_text(text)
    return root


def ask(folders, *converted, **options):
    fields = {"source": str(folders / "source"), "converted": converted, "dataset": str(folders / "text.txt")}
    return EvalRequest(**{**fields, "window": 32, "device": "cpu", **options})


class Listener:
    def __init__(self):
        self.tasks = {}

    def task(self, description, total):
        steps = self.tasks[description, total] = []

        class Task:
            def __enter__(self):
                return steps.append

            def __exit__(self, *args):
                pass

        return Task()


def test_the_report_holds_source_and_conversions(folders, llama, deepseek, tokenizer, text):
    converted = str(folders / "converted")
    listener = Listener()
    report = evaluate(ask(folders, converted, converted, max_tokens=330, batch_size=4), progress=listener)

    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:320])
    expected = measure_agreement(llama, deepseek, tokens.view(10, 32), batch_size=4)
    assert report.source.nll == pytest.approx(expected.source.nll)
    assert report.source.perplexity == math.exp(report.source.nll)
    assert (report.source.kl, report.source.excess_nll, report.source.top1_agreement) == (None, None, None)
    first, second = report.converted
    assert first == second
    assert first.name == converted
    assert first.excess_nll == pytest.approx(expected.converted.nll - expected.source.nll)
    assert first.kl == pytest.approx(expected.kl)
    assert first.top1_agreement == expected.top1_agreement
    assert first.kv_bytes_per_token == 2 * 24 * 4
    assert first.num_parameters == deepseek.num_parameters()

    assert (report.data.num_tokens, report.data.num_windows, report.data.num_positions) == (320, 10, 310)
    assert report.data.sha256 == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    assert list(listener.tasks.values()) == [[4, 4, 2]]
    assert list(listener.tasks) == [(f"Comparing {converted}", 10)]
    assert EvalReport.model_validate_json(report.model_dump_json()) == report


def test_a_source_alone_is_evaluated(folders):
    listener = Listener()
    report = evaluate(ask(folders, max_tokens=64), progress=listener)
    assert report.converted == ()
    assert report.source.perplexity > 1
    assert list(listener.tasks) == [(f"Evaluating {folders / 'source'}", 2)]


def test_another_dtype_is_another_cache(folders):
    report = evaluate(ask(folders, max_tokens=64, dtype="bfloat16"))
    assert report.source.kv_bytes_per_token == 3 * 40 * 2
    assert report.dtype == "bfloat16"


def test_another_vocabulary_is_refused(folders, llama):
    config = llama.config.__class__.from_dict({**llama.config.to_dict(), "vocab_size": 99})
    other = folders / "other"
    LlamaForCausalLM(config).save_pretrained(other)
    with pytest.raises(
        CheckpointError, match=r"other has 99 tokens in its vocabulary and .*source has 281: only a model"
    ):
        evaluate(ask(folders, str(other)))


def test_a_window_longer_than_the_context_is_refused(folders):
    with pytest.raises(UsageError, match="source has a context of 256 tokens: lower --window, which is 257"):
        evaluate(ask(folders, window=257))


def test_a_device_that_is_not_there_is_refused(folders):
    for device in ("abacus", "cuda:99"):
        with pytest.raises(UsageError, match=f"The device '{device}' cannot be used here: pass --device auto"):
            evaluate(ask(folders, device=device))


def test_a_text_too_short_is_refused(folders, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match="one window needs 32"):
        evaluate(ask(folders, dataset=str(tmp_path / "short.txt")))


@pytest.fixture
def damaged(folders, tmp_path):
    def damage(change):
        folder = tmp_path / "damaged"
        shutil.copytree(folders / "converted", folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return damage


def test_absent_weights_are_refused(folders, damaged):
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    folder = damaged(lambda weights: weights.pop(name))
    with pytest.raises(
        CheckpointError, match=rf"damaged lacks 1 of its weights, {name} among them: convert or download"
    ):
        evaluate(ask(folders, folder))


def test_a_loss_that_is_not_finite_names_the_model(folders, damaged):
    folder = damaged(lambda weights: weights["lm_head.weight"].fill_(torch.nan))
    with pytest.raises(
        CheckpointError, match=r"The loss of .*damaged is not finite in float32: its weights are damaged"
    ):
        evaluate(ask(folders, folder))


def test_a_source_without_tokenizer_is_refused(folders):
    with pytest.raises(CheckpointError, match=r"The tokenizer of .*converted cannot be loaded: "):
        evaluate(ask(folders, source=str(folders / "converted")))


def test_weights_that_are_not_safetensors_are_refused(folders, tmp_path):
    folder = tmp_path / "torn"
    shutil.copytree(folders / "converted", folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"The model of .*torn cannot be loaded: "):
        evaluate(ask(folders, str(folder)))


def test_an_unknown_architecture_is_refused(folders, tmp_path):
    folder = tmp_path / "unknown"
    shutil.copytree(folders / "converted", folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(CheckpointError, match=r"The config of .*unknown cannot be loaded: .*unheard-of"):
        evaluate(ask(folders, str(folder)))
