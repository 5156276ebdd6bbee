import hashlib
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import transmla.evaluate.lazy_model
from transmla.config import EvalRequest
from transmla.errors import CheckpointError, DataError, UsageError
from transmla.evaluate.paired_scores import PairedScores
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.report.tables import report_tables_of
from transmla.evaluate.run import evaluate
from transmla.evaluate.statistics import text_score
from transmla.evaluate.windows import ScoredWindows


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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSMLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "eval"


def test_the_report_holds_source_and_conversions(folders, llama, deepseek, tokenizer, text):
    converted = str(folders / "converted")
    listener = Listener()
    report = evaluate(ask(folders, converted, max_tokens=330, batch_size=4), progress=listener)

    windows = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:320]).view(10, 32)
    with torch.no_grad():
        p, q = (model(windows).logits[:, :-1].double().log_softmax(-1) for model in (llama, deepseek))
    source_nll, nll = (-logprobs.gather(-1, windows[:, 1:, None]).squeeze(-1) for logprobs in (p, q))
    [one] = report.texts
    first, second = one.scores
    assert first.nll == pytest.approx(source_nll.mean().item())
    assert first.perplexity == math.exp(first.nll)
    assert (first.kl, first.excess_nll, first.top1_agreement) == (None, None, None)
    num_bytes = len(tokenizer.decode(windows.flatten()).encode())
    assert second.bits_per_byte == pytest.approx(nll.mean().item() * 320 / num_bytes / math.log(2))
    difference = (nll - source_nll).mean(1)
    assert second.excess_nll == pytest.approx(difference.mean().item())
    assert second.excess_se == pytest.approx(difference.std().item() / math.sqrt(10), rel=1e-4)
    assert second.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())
    assert second.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())

    source, other = report.models
    assert (source.name, other.name) == (str(folders / "source"), converted)
    assert other.kv_bytes_per_token == 2 * 24 * 4
    assert other.kv_bytes_computed == 2 * 24 * 4
    assert source.kv_bytes_computed == 3 * 40 * 4 == source.kv_numbers_per_token_layer * 3 * 4
    assert other.num_parameters == deepseek.num_parameters()

    assert (one.data.num_tokens, one.data.num_windows, one.data.num_positions) == (320, 10, 310)
    assert one.data.sha256 == hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    assert list(listener.tasks.values()) == [[4, 4, 2]] * 2
    assert list(listener.tasks) == [(f"{folders / name} reads text.txt", 10) for name in ("source", "converted")]
    assert EvalReport.model_validate_json(report.model_dump_json()) == report


def test_losses_are_put_together_by_position(folders, llama, tokenizer, text, monkeypatch):
    monkeypatch.setattr("transmla.evaluate.statistics.FIRST_BUCKET", 12)
    report = evaluate(ask(folders, str(folders / "converted"), window=50, max_tokens=200))
    windows = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:200]).view(4, 50)
    with torch.no_grad():
        logprobs = llama(windows).logits[:, :-1].log_softmax(-1)
    nll = -logprobs.gather(-1, windows[:, 1:, None]).squeeze(-1)
    buckets = report.texts[0].scores[0].positions
    assert [(b.start, b.stop, b.num_positions) for b in buckets] == [
        *((0, 12, 44), (12, 24, 48), (24, 48, 96), (48, 96, 8))
    ]
    for bucket in buckets:
        # Column t predicts the token that has t + 1 others before it.
        expected = nll[:, max(0, bucket.start - 1) : bucket.stop - 1].mean().item()
        assert bucket.nll == pytest.approx(expected, rel=1e-5)
    converted = report.texts[0].scores[1]
    whole = sum(bucket.excess_nll * bucket.num_positions for bucket in converted.positions) / 196
    assert whole == pytest.approx(converted.excess_nll)


def test_a_long_window_has_a_bucket_for_every_octave():
    windows = ScoredWindows((torch.zeros(8192, dtype=torch.int64),), (1,), tokens_per_byte=1.0)
    nll = numpy.arange(1, 8192, dtype=numpy.float64)
    scores = {"nll": nll + 1, "kl": nll, "top1": nll, "top5": nll}
    found = text_score("longer", windows, scores, {"nll": nll}).positions
    edges = [0, 256, 512, 1024, 2048, 4096, 8192]
    assert [(bucket.start, bucket.stop) for bucket in found] == list(pairwise(edges))
    assert [bucket.num_positions for bucket in found] == [255, 256, 512, 1024, 2048, 4096]
    assert {bucket.excess_nll for bucket in found} == {1}
    assert [bucket.kl for bucket in found[1:]] == [(start + stop - 1) / 2 for start, stop in pairwise(edges[1:])]


def test_several_texts_are_judged_in_one_call(folders, tmp_path, text):
    (tmp_path / "other.txt").write_text(text.replace("fox", "cat"))
    report = evaluate(ask(folders, dataset=(str(folders / "text.txt"), str(tmp_path / "other.txt")), max_tokens=64))
    assert [Path(one.data.dataset).name for one in report.texts] == ["text.txt", "other.txt"]
    assert report.texts[0].scores[0].nll != report.texts[1].scores[0].nll


@pytest.fixture
def loaded(monkeypatch):
    names = []
    load = transmla.evaluate.lazy_model.load_model

    def watched(model, **options):
        names.append(Path(model.name).name)
        return load(model, **options)

    monkeypatch.setattr(transmla.evaluate.lazy_model, "load_model", watched)
    return names


def test_what_is_known_costs_nothing(folders, cache, loaded, monkeypatch):
    request = ask(folders, str(folders / "converted"), max_tokens=64)
    first = evaluate(request)
    assert loaded == ["source", "converted"]
    assert evaluate(request) == first
    assert loaded == ["source", "converted"]
    evaluate(request.model_copy(update={"no_cache": True}))
    assert loaded == ["source", "converted"] * 2
    evaluate(request.model_copy(update={"window": 16}))
    assert loaded == ["source", "converted"] * 3
    assert not list(cache.glob("*.part"))
    # Of the source only the head runs once its hidden states are there.
    shutil.copytree(folders / "converted", folders / "again")
    weights = load_file(folders / "again" / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, folders / "again" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(PairedScores, "_read_source", lambda *_: pytest.fail("The source reads the text again."))
    more = evaluate(ask(folders, str(folders / "converted"), str(folders / "again"), max_tokens=64))
    assert more.texts[0].scores[:2] == first.texts[0].scores
    assert more.texts[0].scores[2].kl > 0


def test_states_that_would_fill_a_disk_are_not_kept(folders, cache, monkeypatch):
    monkeypatch.setattr("transmla.evaluate.result_cache.MAX_STATES", 1000)
    request = ask(folders, max_tokens=64)
    alone = evaluate(request)
    assert not list(cache.glob("*.states"))
    both = evaluate(request.model_copy(update={"converted": (str(folders / "converted"),)}))
    assert both.texts[0].scores[0] == alone.texts[0].scores[0]


def test_changed_weights_are_another_model(folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders / "converted", folder)
    before = evaluate(ask(folders, str(folder), max_tokens=64))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    after = evaluate(ask(folders, str(folder), max_tokens=64))
    assert before.models[1].fingerprint != after.models[1].fingerprint
    assert before.texts[0].scores[1].nll != after.texts[0].scores[1].nll


def test_an_interrupted_run_leaves_nothing_that_looks_finished(folders, cache, monkeypatch):
    request = ask(folders, str(folders / "converted"), max_tokens=64)
    with monkeypatch.context() as patch:
        patch.setattr("transmla.evaluate.token_scores._nll", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(request)
    assert not [*cache.glob("*.states"), *cache.glob("*.npz"), *cache.glob("*.part")]
    assert evaluate(request) == evaluate(request.model_copy(update={"no_cache": True}))


def test_speed_is_measured_by_bench(folders):
    report = evaluate(ask(folders, str(folders / "converted"), dataset=(), bench_contexts=(64, 128)))
    [bench] = report.speed
    assert [(cell.model, cell.form, cell.context) for cell in bench.cells] == [
        (str(folders / name), form, context)
        for context in (64, 128)
        for name, form in (("source", "expanded"), ("converted", "expanded"), ("converted", "absorbed"))
    ]
    speed = list(report_tables_of(report))[-1]
    assert [row[0] for row in speed.rows[:3]] == ["source", "converted", "converted, absorbed"]


def test_nothing_to_measure_is_refused(folders):
    with pytest.raises(
        UsageError, match="There is nothing to measure: pass --dataset, --tasks, --needle-lengths, --chat-prompts or --"
    ):
        evaluate(ask(folders, dataset=()))


def test_another_dtype_is_another_cache(folders):
    report = evaluate(ask(folders, max_tokens=64, dtype="bfloat16"))
    assert report.models[0].kv_bytes_per_token == 3 * 40 * 2
    assert report.dtype == "bfloat16"


def test_another_vocabulary_is_refused(folders, llama):
    config = llama.config.__class__.from_dict({**llama.config.to_dict(), "vocab_size": 99})
    other = folders / "other"
    LlamaForCausalLM(config).save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"other, .* has 99 embeddings instead of 281: only a model"):
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
