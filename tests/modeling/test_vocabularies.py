"""Models whose vocabularies are padded, or are others, beside their source."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.factory import TEXT, tiny_checkpoint, tiny_tokenizer
from transmla.config import EvalRequest, VerifyRequest
from transmla.errors import CheckpointError
from transmla.evaluate.run import evaluate
from transmla.verify.run import verify

pytestmark = pytest.mark.usefixtures("own_cache")

SIZE, WINDOW = 401, 32


def resized(model, folder, size):
    """The same model with other rows behind those of its tokens, which are far from never said."""
    tiny_checkpoint(folder, vocab_size=size)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in load_file(model / "model.safetensors").items():
        rows = min(len(weights[name]), len(tensor))
        weights[name][:rows] = tensor[:rows]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def ask(tmp_path, source, *converted, **options):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = {"dataset": str(tmp_path / "text.txt"), "window": WINDOW, "device": "cpu", **options}
    return EvalRequest(source=str(source), converted=tuple(map(str, converted)), **options)


def reworded(folder):
    """Another tokenizer of the same size: two tokens have changed places."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    words = state["model"]["vocab"]
    one, other = (next(word for word, number in words.items() if number == wanted) for wanted in (40, 41))
    words[one], words[other] = words[other], words[one]
    path.write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize("size", [389, 480])
def test_padded_vocabularies_are_compared_over_the_shared_tokens(tmp_path, size):
    source = tiny_checkpoint(tmp_path / "source")
    other = resized(tiny_checkpoint(tmp_path / "other", seed=1), tmp_path / "resized", size)
    told = []
    [text] = evaluate(ask(tmp_path, source, other, bos="never"), tell=told.append).texts
    shared = min(SIZE, size)
    [sentence] = [line for line in told if "embeddings" in line]
    assert f"over the {shared} tokens that they share, whose probabilities are renormalized" in sentence

    tokens = torch.tensor(tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"])
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        here, there = (
            AutoModelForCausalLM.from_pretrained(folder)(windows).logits[:, :-1] for folder in (source, other)
        )
    p, q = (logits[..., :shared].log_softmax(-1) for logits in (here, there))
    found = text.scores[1]
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    # The loss is over all that a model can say.
    nll = -there.log_softmax(-1).gather(-1, windows[:, 1:, None]).mean().item()
    assert found.nll == pytest.approx(nll, rel=1e-5)


def test_a_source_with_more_rows_is_the_same_model(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    padded = resized(source, tmp_path / "padded", 480)
    [text] = evaluate(ask(tmp_path, source, padded, needle_lengths=(128,), needle_trials=2, needle_depths=1)).texts
    assert text.scores[1].kl == pytest.approx(0, abs=1e-6)
    assert text.scores[1].top1_agreement == 1
    report = verify(VerifyRequest(model=str(padded), source=str(source), device="cpu"))
    [check] = [check for check in report.checks if "over the 401 tokens that both have" in check.found]
    assert check.outcome == "passed"


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    source, other = (tiny_checkpoint(tmp_path / name) for name in ("source", "other"))
    reworded(other)
    with pytest.raises(CheckpointError, match=r"other, .* has another tokenizer .token 40 is .*: only a model"):
        evaluate(ask(tmp_path, source, other))


def test_models_with_all_tokens_in_common_are_not_told(tmp_path):
    source, other = (tiny_checkpoint(tmp_path / name) for name in ("source", "other"))
    told = []
    evaluate(ask(tmp_path, source, other), tell=told.append)
    assert not [line for line in told if "embeddings" in line]
    # Without a tokenizer of its own, a model reads what the source's gives.
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    evaluate(ask(tmp_path, source, other), tell=told.append)


def test_what_is_not_read_is_told_as_by_the_other_commands(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    rows = [{"text": TEXT, "id": 1}, {"text": None, "id": 2}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = []
    [text] = evaluate(ask(tmp_path, source, dataset=str(tmp_path / "a.jsonl")), tell=told.append).texts
    rows_told, tokens_told = told
    assert rows_told.endswith("a.jsonl: 1 of 2 rows hold nothing in text; the columns id are not read.")
    assert f"{text.data.num_tokens_dropped} token" in tokens_told
    assert text.data.unread_columns == ("id",)
