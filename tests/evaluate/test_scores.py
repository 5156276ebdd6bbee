import copy
import math

import pytest
import torch

from transmla.errors import CheckpointError
from transmla.evaluate.scores import Loss, measure_agreement, measure_loss


def brute_force_loss(model, windows):
    """Predict every token from its own prefix alone, in a plain loop."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            for end in range(1, len(window)):
                logits = model(window[None, :end]).logits[0, -1].double()
                total -= logits.log_softmax(-1)[window[end]].item()
                count += 1
    return total / count, count


@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_perplexity_is_the_brute_force_one(family, windows, request):
    model = request.getfixturevalue(family)
    nll, num_positions = brute_force_loss(model, windows)
    for batch_size in (1, 2, 8):
        loss = measure_loss(model, windows, batch_size=batch_size)
        assert loss.num_positions == num_positions == 5 * 12
        assert loss.nll == pytest.approx(nll, rel=1e-6)
        assert loss.perplexity == pytest.approx(math.exp(nll), rel=1e-6)


def test_agreement_holds_both_losses_and_the_divergence(llama, deepseek, windows):
    agreement = measure_agreement(llama, deepseek, windows, batch_size=2)
    assert agreement.source.nll == pytest.approx(measure_loss(llama, windows).nll, rel=1e-6)
    assert agreement.converted.nll == pytest.approx(measure_loss(deepseek, windows).nll, rel=1e-6)
    with torch.no_grad():
        p, q = (model(windows).logits[:, :-1].double().log_softmax(-1) for model in (llama, deepseek))
    assert agreement.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-6)
    assert agreement.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean()


def test_a_model_agrees_with_itself(llama, windows):
    agreement = measure_agreement(llama, llama, windows)
    assert agreement.kl == 0
    assert agreement.top1_agreement == 1
    assert agreement.source == agreement.converted


def test_every_window_is_reported_once(llama, windows):
    steps = []
    measure_loss(llama, windows, batch_size=2, advance=steps.append)
    measure_agreement(llama, llama, windows, batch_size=3, advance=steps.append)
    assert steps == [2, 2, 1, 3, 2]


def test_an_absurd_loss_is_infinitely_perplexing():
    assert Loss(nll=1000.0, num_positions=1).perplexity == math.inf


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.float32, "its weights are damaged"), (torch.bfloat16, "try --dtype float32")]
)
def test_a_loss_that_is_not_finite_names_the_model(llama, windows, dtype, remedy):
    broken = copy.deepcopy(llama).to(dtype)
    broken.name_or_path = "some/model"
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(CheckpointError, match=rf"The loss of some/model is not finite in \w+: {remedy}\."):
        measure_loss(broken, windows)
    with pytest.raises(CheckpointError, match="some/model"):
        measure_agreement(llama.to(torch.float32), broken, windows)
