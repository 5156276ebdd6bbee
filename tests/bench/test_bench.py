"""What a benchmark counts is exact; what it times is only there, in turn, and positive."""

import pytest
import torch

from scripts.benchmarks.filled_cache import fill_cache, run_filled
from transmla.bench import interleave as contest
from transmla.bench.interleave import Runs, run_interleaved, variants_of
from transmla.bench.memory import measure_memory
from transmla.bench.report import BenchReport, paired_speedup
from transmla.bench.run import bench, make_cells, random_prompt
from transmla.bench.timing import Run, run_prompt
from transmla.config import BenchRequest
from transmla.errors import CheckpointError, UsageError
from transmla.modeling.kv_cache import cache_argument, cache_of, measure_cache

FORMS = [("source", "expanded"), ("mla", "expanded"), ("mla", "absorbed")]


@pytest.fixture(scope="module")
def request_of(exact_pair):
    source, converted = map(str, exact_pair)

    def request_of(*others, **options):
        fields = {"source": source, "converted": others or (converted,), "device": "cpu"}
        return BenchRequest(**{**fields, "contexts": (24,), "num_new_tokens": 4, "num_rounds": 2, **options})

    return request_of


@pytest.fixture
def rivals(llama, deepseek):
    return [*variants_of("source", llama), *variants_of("mla", deepseek)]


def test_the_report_has_every_model_in_every_form(request_of, exact_pair):
    report = bench(request_of(contexts="40,24", batch_sizes=[3, "1"]))
    places = [(cell.context, cell.batch_size) for cell in report.cells]
    assert places == [place for place in [(24, 1), (24, 3), (40, 1), (40, 3)] for _ in FORMS]
    names = {str(folder): name for folder, name in zip(exact_pair, ("source", "mla"), strict=True)}
    assert [(names[cell.model], cell.form) for cell in report.cells] == FORMS * 4
    assert [(names[model.name], model.form) for model in report.models] == FORMS
    for cell in report.cells:
        assert len(cell.first_token_rounds) == len(cell.decode_rounds) == 2
        assert min(cell.first_token_rounds + cell.decode_rounds) > 0
        assert cell.decode_tokens_per_second == pytest.approx(cell.batch_size * 4 / (sum(cell.decode_rounds) / 2))
        # Exact, so at equal cache.
        assert cell.cache_bytes == cell.context * cell.batch_size * 64 * 2 * 4
        weights = next(
            model.weight_bytes for model in report.models if (model.name, model.form) == (cell.model, cell.form)
        )
        assert cell.peak_bytes_decode > weights + cell.cache_bytes
        assert cell.peak_bytes_first_token > weights
    assert {cell.decode_speedup for cell in report.cells if names[cell.model] == "source"} == {1.0}
    assert (report.dtype, report.num_rounds, report.num_threads) == ("float32", 2, torch.get_num_threads())
    assert BenchReport.model_validate_json(report.model_dump_json()) == report


def test_the_cache_is_the_one_that_eval_measures(llama, deepseek):
    for model in (llama, deepseek):
        run = run_prompt(model, random_prompt(281, batch_size=3, num_tokens=11, seed=0), num_new_tokens=5)
        assert run.cache_bytes == 3 * 16 * measure_cache(model).bytes_per_token
        filled = run_filled(model, context=16, batch_size=3, num_new_tokens=5, roomy=True)
        assert filled.cache_bytes == run.cache_bytes


def test_a_run_decodes_what_generate_says(llama):
    """The likeliest tokens, fed back one by one."""
    prompt = random_prompt(281, batch_size=2, num_tokens=9, seed=1)
    fed = []
    hook = llama.get_input_embeddings().register_forward_hook(lambda module, tokens, _: fed.append(tokens[0]))
    run_prompt(llama, prompt, num_new_tokens=5)
    hook.remove()
    output = llama.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(torch.cat(fed, dim=1), output)


def test_all_take_turns_and_only_the_first_round_measures_memory(rivals):
    seen = []

    def work(model, *, memory):
        seen.append((type(model).__name__, type(model.model.layers[0].self_attn).__name__, memory))
        return Run(decode_seconds=1.0, cache_bytes=0)

    steps = []
    results = run_interleaved(rivals, work, num_rounds=2, advance=steps.append)
    assert [turn[2] for turn in seen] == [True] * 3 + [False] * 6
    assert seen[3:6] == seen[6:9] == [(*turn[:2], False) for turn in seen[:3]]
    assert [turn[1] for turn in seen[:3]] == ["LlamaAttention", "DeepseekV3Attention", "AbsorbedDeepseekV3Attention"]
    assert steps == [1] * 9
    assert [len(runs.decode_seconds) for runs in results] == [2, 2, 2]


def test_one_without_enough_memory_leaves_and_the_others_go_on(rivals):
    prompt = random_prompt(281, batch_size=2, num_tokens=9, seed=1)

    def work(model, *, memory):
        if model is rivals[1].model:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return run_prompt(model, prompt, num_new_tokens=3, memory=memory)

    results = run_interleaved(rivals, work, num_rounds=1)
    source, stock, absorbed = make_cells(rivals, results, prompt, num_new_tokens=3)
    assert (source.problem, stock.problem, absorbed.problem) == (None, "out of memory", "out of memory")
    assert source.decode_tokens_per_second > 0
    assert stock.decode_tokens_per_second is stock.cache_bytes is stock.peak_bytes_decode is None


def test_without_the_source_there_is_nothing_to_compare_with(rivals):
    done = Runs(runs=[Run(1.0, 8, first_seconds=1.0)] * 2)
    prompt = random_prompt(281, batch_size=1, num_tokens=9, seed=1)
    cells = list(make_cells(rivals, [Runs(problem="out of memory"), done, done], prompt, num_new_tokens=3))
    assert [cell.decode_speedup for cell in cells] == [None] * 3
    assert cells[1].decode_tokens_per_second == 3.0


def test_memory_that_is_not_there_is_no_crash(rivals, monkeypatch):
    monkeypatch.setattr(contest, "memory_limit", lambda device: pytest.raises(RuntimeError))
    assert contest.attempt(rivals[0], lambda model, memory: torch.empty(2**60, dtype=torch.int8), memory=False) is None


def test_another_error_is_not_swallowed(rivals):
    def work(model, *, memory):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_interleaved(rivals, work, num_rounds=1)


def test_speedups_are_paired():
    """A slow second round for both is no difference between them."""
    assert paired_speedup([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.parametrize("roomy", [True, False])
@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_a_filled_cache_decodes_like_one_that_was_read(family, roomy, request):
    """With what a prompt left in it, instead of random numbers."""
    model = request.getfixturevalue(family)
    prompt = random_prompt(281, batch_size=2, num_tokens=12, seed=3)
    with torch.inference_mode():
        expected = model(prompt).logits[:, -3:]
        read = cache_of(model(prompt[:, :9], use_cache=True))
        cache = fill_cache(model, num_tokens=9, batch_size=2, num_new_tokens=3, roomy=roomy)
        for layer, pattern in zip(cache.layers, read.layers, strict=True):
            layer.keys.copy_(pattern.keys)
            layer.values.copy_(pattern.values)
        logits = [
            model(prompt[:, place : place + 1], **{cache_argument(model): cache}).logits for place in range(9, 12)
        ]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 12


def test_a_roomy_cache_is_not_copied(llama):
    """Stock's layer holds old and new at once."""
    peaks = {}
    for roomy in (True, False):
        with torch.inference_mode():
            cache = fill_cache(llama, num_tokens=200, batch_size=8, num_new_tokens=1, roomy=roomy)
            with measure_memory(torch.device("cpu")) as meter:
                llama(torch.zeros((8, 1), dtype=torch.long), **{cache_argument(llama): cache})
                peaks[roomy] = meter.lap()
    assert peaks[False] - peaks[True] > 8 * 200 * measure_cache(llama).bytes_per_token * 0.9


def test_contexts_that_cannot_be(request_of, exact_pair, llama, tmp_path):
    with pytest.raises(UsageError, match=r"source has a context of 512 tokens: lower --contexts, which is 513\."):
        bench(request_of(contexts=(16, 513)))
    message = r"A context of 4 tokens has no room for a prompt and 4 new tokens: raise --contexts, or lower"
    with pytest.raises(UsageError, match=message):
        bench(request_of(contexts=(4, 16)))
    llama.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other, .* has 281 embeddings instead of 401"):
        bench(request_of(str(tmp_path / "other")))


def test_another_type_is_that_of_all(request_of):
    report = bench(request_of(dtype="bfloat16", num_rounds=1))
    assert report.dtype == "bfloat16"
    assert {cell.cache_bytes for cell in report.cells} == {24 * 64 * 2 * 2}
