"""Looking back, greedy divergence, and single layers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.factory import TEXT, tiny_checkpoint, tiny_tokenizer
from transmla.config import ConvertRequest, EvalRequest
from transmla.convert.run import convert
from transmla.data.synthetic import copy_prompt, needle_prompt, whole_words
from transmla.errors import UsageError
from transmla.evaluate.parts.greedy import write_greedily
from transmla.evaluate.run import evaluate

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A source, an exact conversion of it, and a small one."""
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    source = tiny_checkpoint(root / "source")
    common = {"model": str(source), "device": "cpu"}
    convert(ConvertRequest(**common, output_dir=root / "exact", exact=True))
    convert(
        ConvertRequest(
            **common,
            output_dir=root / "small",
            kv_ratio=0.5,
            calibration=str(root / "text.txt"),
            num_windows=8,
            window=32,
        )
    )
    return root


def ask(folders, *converted, **options):
    return EvalRequest(
        source=str(folders / "source"),
        converted=tuple(str(folders / name) for name in converted),
        device="cpu",
        **options,
    )


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_needle_lies_where_it_should(depth):
    tokenizer = tiny_tokenizer()
    trial = needle_prompt(tokenizer, length=400, depth=depth, seed=3)
    assert len(trial.tokens) == 400
    text = tokenizer.decode(trial.tokens, skip_special_tokens=True)
    answer = tokenizer.decode(trial.tokens[-trial.answer :]).strip()
    assert text.endswith(f"is {answer}")
    assert text.count(answer) == 2
    place = text.index("The secret number of") / text.index("What is the secret number")
    assert place == pytest.approx(depth, abs=0.2)
    assert trial == needle_prompt(tokenizer, length=400, depth=depth, seed=3)
    assert trial != needle_prompt(tokenizer, length=400, depth=depth, seed=4)


def test_a_copy_says_everything_twice():
    trial = copy_prompt(range(5, 50), length=41, seed=0)
    assert len(trial.tokens) == 40
    assert trial.tokens[:20] == trial.tokens[20:]
    # The first word of the second time cannot be known.
    assert trial.answer == 19


@pytest.mark.parametrize("start", [(), (0,), (0, 3)], ids=str)
def test_trials_begin_as_texts_do(start):
    tokenizer = tiny_tokenizer()
    needle = needle_prompt(tokenizer, length=300, depth=0.5, seed=0, start=start)
    copy = copy_prompt(range(5, 50), length=41, seed=0, start=start)
    assert needle.tokens[: len(start)] == copy.tokens[: len(start)] == start
    assert needle.tokens.count(0) == copy.tokens.count(0) == start.count(0)
    assert len(needle.tokens) == 300
    half = copy.tokens[len(start) :]
    assert half[: len(half) // 2] == half[len(half) // 2 :]
    assert copy.answer == len(half) // 2 - 1


def test_bos_decides_what_trials_begin_with(folders):
    few = {"needle_lengths": (128,), "needle_depths": 1, "needle_trials": 2}
    found = {
        bos: evaluate(ask(folders, **few, bos=bos)).contexts[0].scores[0].nll for bos in ("auto", "always", "never")
    }
    assert found["auto"] == found["always"] != found["never"]


def test_words_are_words():
    tokenizer = tiny_tokenizer()
    words = whole_words(tokenizer, vocab_size=len(tokenizer))
    assert len(words) > 50
    assert not set(words) & set(tokenizer.all_special_ids)


def test_looking_back_is_judged_at_every_length_and_depth(folders):
    few = {"needle_depths": 3, "needle_trials": 2, "probes": ("needle", "copy")}
    report = evaluate(ask(folders, "exact", needle_lengths=(128, 256), **few, batch_size=2))
    cells = [(cell.kind, cell.length, cell.depth) for cell in report.contexts]
    needles = [("needle", 0.0), ("needle", 0.5), ("needle", 1.0), ("copy", None)]
    assert sorted(cells, key=str) == sorted(((k, n, d) for n in (128, 256) for k, d in needles), key=str)
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folders / "source").eval()
    for cell in report.contexts:
        trials = [
            copy_prompt(whole_words(tokenizer, vocab_size=len(tokenizer)), length=cell.length, seed=seed, start=[0])
            if cell.depth is None
            else needle_prompt(tokenizer, length=cell.length, depth=cell.depth, seed=seed, start=[0])
            for seed in range(2)
        ]
        right = []
        for trial in trials:
            tokens = torch.tensor([trial.tokens])
            with torch.no_grad():
                likeliest = model(tokens).logits[0, :-1].argmax(-1)
            right.append((likeliest == tokens[0, 1:])[-trial.answer :].float())
        source, exact = cell.scores
        assert source.token_accuracy == pytest.approx(torch.cat(right).mean().item())
        assert source.exact == sum(bool(row.all()) for row in right) / 2
        assert exact.nll == pytest.approx(source.nll, abs=1e-4)
        assert exact.kl < 1e-5


def test_a_context_without_room_is_refused(folders):
    with pytest.raises(UsageError, match="40 tokens have no room for a needle"):
        evaluate(ask(folders, needle_lengths=(40,)))
    with pytest.raises(UsageError, match=r"has a context of .* tokens: lower --needle-lengths, which is 100000"):
        evaluate(ask(folders, needle_lengths=(100_000,)))


def begun_windows(tokenizer, text, count):
    """Windows of 64 tokens, each with the token in front that begins a text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: count * 63]
    return torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 63]] for start in range(0, count * 63, 63)])


def test_greedy_divergence_is_what_writing_shows(folders):
    options = {"dataset": str(folders / "text.txt"), "window": 64, "max_tokens": 640}
    report = evaluate(ask(folders, "exact", "small", greedy_prompts=4, greedy_tokens=24, batch_size=3, **options))
    [greedy] = report.greedy
    tokenizer = tiny_tokenizer()
    prompts = begun_windows(tokenizer, TEXT * 30, 10)[[0, 2, 5, 7]]
    source, *others = (
        write_greedily(AutoModelForCausalLM.from_pretrained(folders / name).eval(), prompts, num_new_tokens=24)[:, 64:]
        for name in ("source", "exact", "small")
    )
    for score, written in zip(greedy.scores[1:], others, strict=True):
        same = (written == source).long().cumprod(1).sum(1).tolist()
        assert list(score.same_tokens) == same
        assert score.never_different == sum(length == 24 for length in same) / 4
    source, exact, small = greedy.scores
    assert source is None
    assert exact.never_different == 1
    assert small.agreement < 1


def test_layers_are_replaced_one_at_a_time(folders):
    options = {"dataset": str(folders / "text.txt"), "window": 64, "max_tokens": 640}
    report = evaluate(ask(folders, "exact", "small", per_layer=True, layer_windows=3, batch_size=2, **options))
    source, exact, small = report.layers[0].scores
    assert source is None
    assert report.layers[0].num_positions == 3 * 63
    for layer in exact.layers:
        assert layer.relative_error < 1e-4
        assert layer.excess_nll == pytest.approx(0, abs=1e-5)
    assert all(0.01 < layer.relative_error < 1.5 for layer in small.layers)
    assert sum(layer.share for layer in small.layers) == pytest.approx(1)
    assert [layer.layer for layer in small.layers] == list(range(len(small.layers)))


def test_the_last_layer_alone_is_the_last_layer_of_a_hybrid(folders):
    """Brute force: the source up to its last layer, then the converted layer's attention, by hand."""
    options = {"dataset": str(folders / "text.txt"), "window": 64, "max_tokens": 128}
    report = evaluate(ask(folders, "small", per_layer=True, layer_windows=2, **options))
    tokens = begun_windows(tiny_tokenizer(), TEXT, 2)
    source, small = (AutoModelForCausalLM.from_pretrained(folders / name).eval() for name in ("source", "small"))
    scale = (small.config.rms_norm_eps / source.config.rms_norm_eps) ** 0.5
    with torch.no_grad():
        stream = source(tokens, output_hidden_states=True).hidden_states[-2]
        layer, other = source.model.layers[-1], small.model.layers[-1]
        positions = torch.arange(64)[None]
        inputs = other.input_layernorm(stream * scale)
        output, _ = other.self_attn(inputs, small.model.rotary_emb(inputs, positions), None)
        stream = stream + output / scale
        stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
        logprobs = source.lm_head(source.model.norm(stream))[:, :-1].log_softmax(-1)
    nll = -logprobs.gather(-1, tokens[:, 1:, None]).mean().item()
    alone = report.texts[0].scores[0].nll
    assert report.layers[0].scores[1].layers[-1].excess_nll == pytest.approx(nll - alone, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "flag"), [({"greedy_prompts": 2}, "--greedy-prompts"), ({"per_layer": True}, "--per-layer")]
)
def test_what_compares_needs_text_and_conversions(folders, options, flag):
    with pytest.raises(UsageError, match=f"{flag} needs text: pass --dataset"):
        evaluate(ask(folders, "exact", needle_lengths=(128,), **options))
    with pytest.raises(UsageError, match=f"{flag} compares a source with conversions of it"):
        evaluate(ask(folders, dataset=str(folders / "text.txt"), **options))


def test_too_many_prompts_are_refused(folders):
    with pytest.raises(UsageError, match="has 2 windows of 64 tokens or more, but --greedy-prompts is 3"):
        evaluate(ask(folders, "exact", dataset=str(folders / "text.txt"), window=64, max_tokens=128, greedy_prompts=3))
