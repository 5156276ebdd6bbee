"""Teachers with other rows than their students, against the same written down in full."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.factory import tiny_checkpoint, tiny_tokenizer
from transmla.data.vocabulary import SharedTokens, share_tokens
from transmla.errors import CheckpointError
from transmla.finetune.distill.loss import Mix, chunked_loss
from transmla.finetune.distill.teacher import FullTargets, TopTargets

POSITIONS, HIDDEN = 19, 12
SHARED = {
    "more": SharedTokens(57, 71),
    "fewer": SharedTokens(57, 44),
    "other": SharedTokens(57, 57, (3, 40)),
    "more and other": SharedTokens(57, 71, (0, 5, 56)),
}


def kept(shared):
    return [n for n in range(min(shared.num_here, shared.num_there)) if n not in shared.excluded]


@pytest.fixture
def given():
    """Hidden states and heads of both, and labels, by the vocabularies."""

    def given(shared):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).requires_grad_()
        teacher = torch.randn(POSITIONS, HIDDEN, generator=generator)
        heads = [nn.Linear(HIDDEN, size, bias=False) for size in (shared.num_here, shared.num_there)]
        with torch.no_grad():
            for head in heads:
                head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        labels = torch.randint(40, (POSITIONS,), generator=generator)
        return hidden, heads[0], labels, FullTargets(teacher, heads[1], torch.device("cpu"), shared)

    return given


def both(hidden, head, targets, numbers, temperature):
    """Softmax over the rows of the shared tokens and no others: p of the teacher, q of the student."""
    p, q = (
        torch.stack([weight.weight[number] @ states.mT for number in numbers], dim=-1).div(temperature).softmax(-1)
        for states, weight in ((targets.hidden, targets.head), (hidden, head))
    )
    return p.detach(), q


def compare(hidden, head, sums, wanted, nll, mix):
    loss = (1 - mix.ce_weight) * mix.temperature**2 * wanted + mix.ce_weight * nll
    gradients = torch.autograd.grad(loss, [hidden, head.weight])
    torch.testing.assert_close(sums.kl, wanted.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.nll, nll.detach())
    found = torch.autograd.grad(sums.loss, [hidden, head.weight])
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mix", [Mix(0.0), Mix(0.3, 2.5)], ids=str)
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_divergence_over_the_shared_tokens(given, shared, mix):
    hidden, head, labels, targets = given(shared)
    p, q = both(hidden, head, targets, kept(shared), mix.temperature)
    nll = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    sums = chunked_loss(hidden, head, labels, targets, mix, chunk=5)
    compare(hidden, head, sums, (p * (p / q).log()).sum(), nll, mix)


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_top_probabilities_among_the_shared_tokens(given, shared, temperature, count):
    hidden, head, labels, targets = given(shared)
    numbers = kept(shared)
    p, q = both(hidden, head, targets, numbers, temperature)
    logprobs, tokens = targets.top(slice(None), count, temperature)
    wanted = torch.zeros(())
    for row in range(POSITIONS):
        order = p[row].argsort(descending=True)
        assert tokens[row].tolist() == [numbers[place] for place in order[:count]]
        torch.testing.assert_close(logprobs[row].exp(), p[row, order[:count]])
        for place in order[:count]:
            wanted = wanted + p[row, place] * (p[row, place] / q[row, place]).log()
        rest, other = p[row, order[count:]].sum(), q[row, order[count:]].sum()
        wanted = wanted + rest * (rest / other).log()
    mix = Mix(0.2, temperature)
    nll = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    sums = chunked_loss(hidden, head, labels, TopTargets(logprobs, tokens, shared), mix, chunk=7)
    compare(hidden, head, sums, wanted, nll, mix)


def share(student, teacher, num_here=401, num_there=401):
    return share_tokens(student, teacher, num_here=num_here, num_there=num_there, who="The teacher", advice="name one")


def test_one_tokenizer_shares_what_both_have_rows_for():
    assert share(tiny_tokenizer(), tiny_tokenizer()).are_all
    assert share(tiny_tokenizer(), tiny_tokenizer(), 401, 480) == SharedTokens(401, 480)
    assert share(tiny_tokenizer(), tiny_tokenizer(), 480, 389) == SharedTokens(480, 389)


def test_marks_that_were_added_may_differ():
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    size = len(student)
    student.add_tokens(["<|here|>", "<|both|>", "<|late|>"])
    teacher.add_tokens(["<|there|>", "<|both|>"])
    shared = share(student, teacher)
    assert shared == SharedTokens(401, 401, (size, size + 2))
    assert not shared.are_all
    assert len(shared) == 399
    with pytest.raises(
        CheckpointError, match=rf"has {size + 2} embeddings, and none for token {size + 2}, '<\|late\|>'"
    ):
        share(student, teacher, num_there=size + 2)
    # Without a row of its own, no text has it.
    assert share(student, teacher, size + 1, size + 2) == SharedTokens(size + 1, size + 2, (size,))


def test_another_tokenizer_is_refused():
    other = tiny_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    last = max(words, key=words.get)
    del words[last]
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "".join(pair) != last]
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"has another tokenizer .token 388 is none there and"):
        share(tiny_tokenizer(), other)
    assert share(other, tiny_tokenizer()).excluded == (388,)


def widened(source, folder, more):
    """The same model with more rows, which are far from never said."""
    tiny_checkpoint(folder, vocab_size=401 + more)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        weights[name][: len(tensor)] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("flags", ["", "--teacher-top-k 401"])
def test_a_padded_teacher_is_the_model_itself(train, cli, tmp_path, flags):
    """The source with more rows teaches its exact conversion nothing, and other weights what they do without them."""
    source = tiny_checkpoint(tmp_path / "source")
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    assert cli("convert", source, tmp_path / "mla", "--exact", "-q").exit_code == 0
    found = {}
    for name, teacher in {"source": source, "other": other}.items():
        for more in (0, 79):
            padded = widened(teacher, tmp_path / f"{name}-{more}", more)
            output = tmp_path / f"{name}-{more}-out"
            train(tmp_path / "mla", output, f"--max-steps 2 --teacher {padded} {flags}")
            report = json.loads((output / "transmla_finetune.json").read_text())
            found[name, more] = [point["kl"] for point in report["heldout"]]
    assert abs(found["source", 79][0]) < (1e-3 if flags else 1e-5)
    assert found["other", 79] == pytest.approx(found["other", 0], rel=2e-3 if flags else 1e-5)
    assert found["other", 0][0] > 0.1
    rows = AutoModelForCausalLM.from_pretrained(tmp_path / "source-79").lm_head.weight
    assert len(rows) == 480
