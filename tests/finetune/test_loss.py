"""The chunked loss against the same written down in full."""

import pytest
import torch
from torch import nn

from transmla.bench.memory import LiveTensors
from transmla.finetune.distill.loss import Mix, chunked_loss
from transmla.finetune.distill.teacher import FullTargets, TopTargets

POSITIONS, HIDDEN, VOCAB = 23, 12, 57


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).requires_grad_()
    head, other = nn.Linear(HIDDEN, VOCAB, bias=False), nn.Linear(HIDDEN, VOCAB, bias=False)
    with torch.no_grad():
        for linear in (head, other):
            linear.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator))
    labels = torch.randint(VOCAB, (POSITIONS,), generator=generator)
    teacher = torch.randn(POSITIONS, HIDDEN, generator=generator)
    return hidden, head, labels, FullTargets(teacher, other, torch.device("cpu"))


def in_full(hidden, head, labels, targets, mix, lengths=(POSITIONS,)):
    """Word for word: (1 - w) T² Σ p log(p / q) - w Σ log q(label), with w = 1 where the teacher is surest."""
    logits = head(hidden)
    log_q = logits.log_softmax(-1)
    nll = -log_q[torch.arange(len(labels)), labels]
    p = (targets.head(targets.hidden) / mix.temperature).softmax(-1).detach()
    q = (logits / mix.temperature).softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    sure = targets.head(targets.hidden).softmax(-1)
    entropies = -(sure * sure.log()).sum(-1)
    weights = torch.full((len(labels),), mix.ce_weight)
    first = 0
    for length in lengths:
        surest = sorted(range(first, first + length), key=lambda place: entropies[place])
        for position in surest[: round(mix.hard_label_share * length)]:
            weights[position] = 1.0
        first += length
    loss = ((1 - weights) * mix.temperature**2 * kl + weights * nll).sum()
    return loss, nll.sum(), kl.sum()


@pytest.mark.parametrize("chunk", [1, 5, POSITIONS, 100])
@pytest.mark.parametrize(
    "mix", [Mix(0.0), Mix(0.3), Mix(1.0), Mix(0.2, 2.5), Mix(0.1, 1.0, 0.2), Mix(0.0, 2.0, 1.0)], ids=str
)
def test_values_and_gradients(given, mix, chunk):
    hidden, head, labels, targets = given
    loss, nll, kl = in_full(hidden, head, labels, targets, mix)
    (3 * loss).backward()
    wanted = [hidden.grad.clone(), head.weight.grad.clone()]
    hidden.grad = head.weight.grad = None

    sums = chunked_loss(hidden, head, labels, targets, mix, chunk=chunk)
    (3 * sums.loss).backward()
    torch.testing.assert_close(torch.stack([sums.loss, sums.nll, sums.kl]), torch.stack([loss, nll, kl]))
    torch.testing.assert_close([hidden.grad, head.weight.grad], wanted)


def test_a_frozen_head_gets_no_gradient(given):
    hidden, head, labels, targets = given
    head.requires_grad_(False)
    chunked_loss(hidden, head, labels, targets, Mix(0.1)).loss.backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_without_a_teacher_it_is_cross_entropy(given):
    hidden, head, labels, _ = given
    sums = chunked_loss(hidden, head, labels, None, Mix(1.0), chunk=4)
    wanted = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(sums.loss, wanted)
    assert sums.kl == 0


def test_measuring_needs_no_gradient(given):
    hidden, head, labels, targets = given
    with torch.no_grad():
        sums = chunked_loss(hidden, head, labels, targets, Mix(0.3), chunk=4)
    torch.testing.assert_close(sums.loss, in_full(hidden, head, labels, targets, Mix(0.3))[0].detach())
    assert not sums.loss.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_top_probabilities_are_all(given, temperature):
    hidden, head, labels, targets = given
    top = TopTargets(*targets.top(slice(None), VOCAB, temperature))
    mix = Mix(0.1, temperature)
    full, some = (chunked_loss(hidden, head, labels, given, mix, chunk=4) for given in (targets, top))
    torch.testing.assert_close(some.kl, full.kl, rtol=1e-4, atol=1e-4)


def test_all_top_probabilities_have_the_same_surest_positions(given):
    hidden, head, labels, targets = given
    top = TopTargets(*targets.top(slice(None), VOCAB, 1.0))
    torch.testing.assert_close(top.entropies(4), targets.entropies(4), rtol=1e-3, atol=1e-3)
    mix = Mix(0.1, hard_label_share=0.3)
    full, some = (chunked_loss(hidden, head, labels, given, mix, chunk=4) for given in (targets, top))
    torch.testing.assert_close(some.loss, full.loss, rtol=1e-4, atol=1e-4)


def test_nothing_to_learn_has_no_loss(given):
    hidden, head, labels, targets = given
    nothing = FullTargets(targets.hidden[:0], targets.head, targets.device)
    sums = chunked_loss(hidden[:0], head, labels[:0], nothing, Mix(0.1, hard_label_share=0.2), lengths=[0, 0])
    sums.loss.backward()
    assert sums.loss == sums.nll == sums.kl == 0


def test_the_surest_are_those_of_each_sequence(given):
    """So that it makes no difference which sequences are in a batch."""
    hidden, head, labels, targets = given
    mix, lengths = Mix(0.1, hard_label_share=0.5), [2, 0, 2, 19]
    loss, *_ = in_full(hidden, head, labels, targets, mix, lengths)
    sums = chunked_loss(hidden, head, labels, targets, mix, lengths=lengths, chunk=4)
    torch.testing.assert_close(sums.loss, loss)
    assert sums.loss != chunked_loss(hidden, head, labels, targets, mix, chunk=4).loss


@pytest.mark.parametrize("count", [1, 3, 20])
def test_some_top_probabilities_and_the_rest(given, count):
    hidden, head, labels, targets = given
    p, q = targets.head(targets.hidden).softmax(-1).detach(), head(hidden).softmax(-1)
    wanted = torch.zeros(())
    for row in range(POSITIONS):
        order = p[row].argsort(descending=True)
        for token in order[:count]:
            wanted = wanted + p[row, token] * (p[row, token] / q[row, token]).log()
        rest, other = p[row, order[count:]].sum(), q[row, order[count:]].sum()
        wanted = wanted + rest * (rest / other).log()
    gradient = torch.autograd.grad(wanted, hidden)[0]

    top = TopTargets(*targets.top(slice(None), count, 1.0))
    sums = chunked_loss(hidden, head, labels, top, Mix(0.0), chunk=7)
    torch.testing.assert_close(sums.kl, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(sums.loss, hidden)[0], gradient, rtol=1e-3, atol=1e-5)
    full = chunked_loss(hidden, head, labels, targets, Mix(0.0))
    assert sums.kl <= full.kl


def test_memory_does_not_grow_with_the_positions():
    """All logits would be 64 MB here, with their gradients several times that."""
    head, other = nn.Linear(8, 16_000, bias=False), nn.Linear(8, 16_000, bias=False)
    hidden = torch.randn(1000, 8).requires_grad_()
    labels = torch.randint(16_000, (1000,))
    targets = FullTargets(torch.randn(1000, 8), other, torch.device("cpu"))
    with LiveTensors() as meter:
        chunked_loss(hidden, head, labels, targets, Mix(0.1), chunk=10).loss.backward()
    # Found: 6 MB, ten times the logits of a chunk.
    assert meter.lap() < 10e6
