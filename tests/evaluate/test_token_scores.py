"""Scores of single tokens against plain loops over the whole model."""

import copy

import pytest
import torch

from transmla.errors import CheckpointError
from transmla.evaluate.token_scores import Reference, score_tokens
from transmla.evaluate.windows import ScoredWindows
from transmla.modeling.lm_head import model_head


def scored(windows, first=1):
    return ScoredWindows(tuple(windows), (first,) * len(windows), tokens_per_byte=0.25)


def states_of(model, text):
    states = torch.empty(text.num_positions, model.config.hidden_size)
    score_tokens(model, text, keep=states)
    return Reference(model_head(model), states)


def brute_force_nll(model, window, first):
    """Predict every token from its own prefix alone, in a plain loop."""
    with torch.no_grad():
        for end in range(first, len(window)):
            logits = model(window[None, :end]).logits[0, -1].double()
            yield -logits.log_softmax(-1)[window[end]].item()


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_losses_are_the_brute_force_ones(family, windows, first, request):
    model = request.getfixturevalue(family)
    expected = [nll for window in windows for nll in brute_force_nll(model, window, first)]
    for batch_size, chunk in ((1, None), (2, 3), (8, 7)):
        scores = score_tokens(model, scored(windows, first), batch_size=batch_size, chunk=chunk)
        assert scores["nll"].tolist() == pytest.approx(expected, rel=1e-5)


def test_passages_of_several_lengths_are_judged_in_order(llama, windows):
    text = ScoredWindows((windows[0], windows[1][:7], windows[2][:7], windows[3]), (1, 1, 3, 1), tokens_per_byte=0.25)
    expected = [
        nll
        for tokens, first in zip(text.tokens, text.first, strict=True)
        for nll in brute_force_nll(llama, tokens, first)
    ]
    assert score_tokens(llama, text, batch_size=4)["nll"].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_comparisons_are_the_softmax_formulas(llama, deepseek, windows, chunk):
    text = scored(windows)
    scores = score_tokens(deepseek, text, batch_size=2, chunk=chunk, reference=states_of(llama, text))
    with torch.no_grad():
        p, q = (model(windows).logits[:, :-1].flatten(0, 1).double().log_softmax(-1) for model in (llama, deepseek))
    assert scores["right"].tolist() == (q.argmax(-1) == windows[:, 1:].flatten()).tolist()
    assert scores["kl"].tolist() == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-4)
    assert scores["top1"].tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    shared = [len(set(a) & set(b)) / 5 for a, b in zip(p.topk(5)[1].tolist(), q.topk(5)[1].tolist(), strict=True)]
    assert scores["top5"].tolist() == pytest.approx(shared)


def test_a_model_agrees_with_itself(llama, windows):
    text = scored(windows)
    scores = score_tokens(llama, text, reference=states_of(llama, text))
    assert scores["kl"].max() == 0
    assert scores["top1"].all()
    assert (scores["top5"] == 1).all()


def test_every_passage_is_reported_once(llama, windows):
    steps = []
    score_tokens(llama, scored(windows), batch_size=2, advance=steps.append)
    assert steps == [2, 2, 1]


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.float32, "its weights are damaged"), (torch.bfloat16, "try --dtype float32")]
)
def test_a_loss_that_is_not_finite_names_the_model(llama, windows, dtype, remedy):
    broken = copy.deepcopy(llama).to(dtype)
    broken.name_or_path = "some/model"
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(CheckpointError, match=rf"The loss of some/model is not finite in \w+: {remedy}\."):
        score_tokens(broken, scored(windows))


def test_logits_exist_for_a_few_positions_only(llama, windows, monkeypatch):
    """No tensor of an evaluation is as large as the logits of a window."""
    largest = []
    head = model_head(llama)

    def watched(model):
        def apply(hidden):
            logits = head(hidden)
            largest.append(logits.numel())
            return logits

        return apply

    monkeypatch.setattr("transmla.evaluate.token_scores.model_head", watched)
    score_tokens(llama, scored(windows), batch_size=5, chunk=4)
    assert max(largest) == 4 * llama.config.vocab_size
