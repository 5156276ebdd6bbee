"""What models say where they must look back, by kind, compared with the source."""

from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM

import transmla.evaluate.lazy_model
from tests.factory import TEXT, tiny_checkpoint, tiny_tokenizer
from transmla.config import ConvertRequest, EvalRequest
from transmla.convert.run import convert
from transmla.data.probes import code_prompt, json_prompt, needles_prompt, passage_prompts
from transmla.errors import UsageError
from transmla.evaluate.parts.long_context import ContextReport, ContextScore
from transmla.evaluate.parts.other_probes import OtherProbesPart
from transmla.evaluate.run import evaluate

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A source, and a small conversion of it."""
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    source = tiny_checkpoint(root / "source")
    text = {"calibration": str(root / "text.txt"), "num_windows": 8, "window": 32}
    convert(ConvertRequest(model=str(source), device="cpu", output_dir=root / "small", kv_ratio=0.5, **text))
    return root


def ask(folders, *converted, **options):
    names = tuple(str(folders / name) for name in converted)
    few = {"needle_depths": 1, "needle_trials": 3, **options}
    return EvalRequest(source=str(folders / "source"), converted=names, device="cpu", **few)


def test_every_kind_is_judged_where_the_text_decides(folders):
    """Brute force: whole logits of both models, one text after the other."""
    kinds = ("passage", "needles", "json", "code")
    dataset = {"dataset": str(folders / "text.txt"), "window": 64, "max_tokens": 128}
    report = evaluate(ask(folders, "small", needle_lengths=(200, 301), probes=kinds, batch_size=2, **dataset))
    assert [(cell.kind, cell.length) for cell in report.contexts] == [(k, n) for n in (200, 301) for k in kinds]
    tokenizer = tiny_tokenizer()
    text = torch.tensor(tokenizer(TEXT * 30, add_special_tokens=False)["input_ids"])[: 3 * 150]
    source, small = (AutoModelForCausalLM.from_pretrained(folders / name).eval() for name in ("source", "small"))
    for cell in report.contexts:
        made = {"needles": needles_prompt, "json": json_prompt, "code": code_prompt}
        if cell.kind == "passage":
            trials = passage_prompts(text, length=cell.length, count=3, start=(0,))
        else:
            trials = [made[cell.kind](tokenizer, length=cell.length, seed=seed, start=(0,)) for seed in range(3)]
        found = []
        for trial in trials:
            tokens = torch.tensor([trial.tokens])
            counts = torch.tensor(trial.counts or (True,) * trial.answer)
            with torch.no_grad():
                p, q = (
                    model(tokens).logits[0, :-1].log_softmax(-1)[-trial.answer :][counts] for model in (source, small)
                )
            answer = tokens[0, -trial.answer :][counts]
            nll, kl = -q.gather(-1, answer[:, None])[:, 0], (p.exp() * (p - q)).sum(-1)
            found.append((nll, kl, (p.argmax(-1) == answer).float(), (q.argmax(-1) == answer).float()))
        nll, kl, right, small_right = (torch.cat(column) for column in zip(*found, strict=True))
        assert cell.num_positions == len(nll)
        one, two = cell.scores
        assert (one.kl, one.share_of_source) == (None, None)
        assert two.nll == pytest.approx(nll.mean().item(), rel=1e-5)
        assert two.kl == pytest.approx(kl.mean().item(), rel=1e-4)
        assert one.token_accuracy == pytest.approx(right.mean().item())
        assert two.token_accuracy == pytest.approx(small_right.mean().item())
        assert two.exact == fmean(bool(of_text.all()) for *_, of_text in found)
        share = small_right.mean() / right.mean() if right.any() else None
        assert two.share_of_source == (share if share is None else pytest.approx(share.item()))


def cell(kind, length, *accuracies):
    scores = (
        ContextScore(
            model=str(number), token_accuracy=accuracy, exact=0.0, nll=1.0, share_of_source=accuracy / accuracies[0]
        )
        for number, accuracy in enumerate(accuracies)
    )
    return ContextReport(kind=kind, length=length, depth=None, num_trials=1, scores=tuple(scores))


def test_other_probes_are_one_number_for_each_conversion():
    cells = [
        cell("needle", 512, 1.0, 0.9, 0.5),
        cell("needle", 1024, 0.5, 0.1, 0.5),
        cell("json", 512, 0.2, 0.1, 0.05),
        # The source itself is hardly ever right.
        cell("json", 1024, 0.09, 0.0, 0.0),
        cell("code", 512, 0.01, 0.0, 0.0),
        # Conversions may be fitted on such texts.
        cell("copy", 512, 0.9, 0.0, 0.0),
        cell("passage", 512, 0.9, 0.0, 0.0),
    ]
    [found] = OtherProbesPart(lambda: cells).report()
    assert (found.kinds, found.num_cells) == (("needle", "json"), 3)
    source, first, second = found.scores
    assert source is None
    assert first.share_of_source == pytest.approx(((0.9 + 0.2) / 2 + 0.5) / 2)
    assert second.share_of_source == pytest.approx(((0.5 + 1.0) / 2 + 0.25) / 2)
    assert list(OtherProbesPart(lambda: cells[4:]).report()) == []


def test_what_has_no_text_or_no_room_is_left_out_and_told(folders):
    told = []
    report = evaluate(ask(folders, needle_lengths=(128,)), tell=told.append)
    assert [cell.kind for cell in report.contexts] == ["needle", "copy", "needles", "json"]
    assert [sentence.split(".")[0] for sentence in told] == [
        "No passage is said twice, for there is no text: pass --dataset, or --probes without passage",
        "The kind code is left out at 128 tokens",
    ]


def test_kinds_that_are_asked_for_by_name_are_not_left_out(folders):
    with pytest.raises(UsageError, match="128 tokens have no room for a text of the kind code"):
        evaluate(ask(folders, needle_lengths=(128,), probes="needle,code"))
    with pytest.raises(UsageError, match="--probes passage needs text: pass --dataset"):
        evaluate(ask(folders, needle_lengths=(128,), probes="passage"))
    with pytest.raises(UsageError, match="--probes says what models look back for: pass --needle-lengths"):
        evaluate(ask(folders, dataset=str(folders / "text.txt"), probes=["json"]))


def test_what_was_read_once_is_not_read_again(folders, monkeypatch):
    request = ask(folders, "small", needle_lengths=(160,), chat_prompts=2, greedy_tokens=8)
    first = evaluate(request)
    monkeypatch.setattr(transmla.evaluate.lazy_model, "load_model", lambda *_, **__: pytest.fail("A model is loaded."))
    assert evaluate(request) == first
    # Other kinds, other lengths and other numbers of texts are other texts.
    for other in ({"needle_lengths": (161,)}, {"needle_trials": 2}, {"chat_prompts": 1}):
        with pytest.raises(pytest.fail.Exception):
            evaluate(request.model_copy(update=other))
