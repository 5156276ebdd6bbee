"""Chats: the source answers as it would, and the others are compared with it token by token."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.factory import CHAT_TEMPLATE, TEXT, tiny_checkpoint
from transmla.config import ConvertRequest, EvalRequest
from transmla.convert.run import convert
from transmla.data.questions import QUESTIONS
from transmla.errors import UsageError
from transmla.evaluate.parts.chat import LONGEST_QUESTION
from transmla.evaluate.run import evaluate

pytestmark = pytest.mark.usefixtures("own_cache")
ENDS = list(range(1, 401, 25))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A source that often comes to an end, an exact conversion of it, and a small one."""
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    source = tiny_checkpoint(root / "source")
    defaults = source / "generation_config.json"
    defaults.write_text(json.dumps({**json.loads(defaults.read_text()), "eos_token_id": ENDS}))
    common = {"model": str(source), "device": "cpu"}
    convert(ConvertRequest(**common, output_dir=root / "exact", exact=True))
    text = {"calibration": str(root / "text.txt"), "num_windows": 8, "window": 32}
    convert(ConvertRequest(**common, output_dir=root / "small", kv_ratio=0.5, **text))
    return root


def ask(folders, *converted, **options):
    names = tuple(str(folders / name) for name in converted)
    return EvalRequest(source=str(folders / "source"), converted=names, device="cpu", **options)


def test_answers_are_the_sources_and_models_are_compared_on_them(folders):
    """Brute force: one token after the other, and whole logits."""
    [chat] = evaluate(ask(folders, "exact", "small", chat_prompts=7, greedy_tokens=20)).chat
    tokenizer = AutoTokenizer.from_pretrained(folders / "source")
    models = [AutoModelForCausalLM.from_pretrained(folders / name).eval() for name in ("source", "exact", "small")]
    nll, kl, same, ended = [[], [], []], [[], [], []], [[], [], []], 0
    for question in QUESTIONS[:7]:
        tokens = [0, *tokenizer(f"user: {question}\n", add_special_tokens=False)["input_ids"]]
        first = len(tokens)
        with torch.no_grad():
            while len(tokens) < first + 20 and (len(tokens) == first or tokens[-1] not in ENDS):
                tokens.append(models[0](torch.tensor([tokens])).logits[0, -1].argmax().item())
            ended += tokens[-1] in ENDS
            logprobs = [model(torch.tensor([tokens])).logits[0, first - 1 : -1].log_softmax(-1) for model in models]
        answer = torch.tensor(tokens[first:])[:, None]
        for number, own in enumerate(logprobs):
            nll[number].append(-own.gather(-1, answer))
            kl[number].append((logprobs[0].exp() * (logprobs[0] - own)).sum(-1))
            same[number].append(own.argmax(-1) == logprobs[0].argmax(-1))
    assert chat.num_positions == sum(map(len, nll[0]))
    assert 0 < chat.num_ended == ended
    assert (chat.num_prompts, chat.num_new_tokens) == (7, 20)
    source, exact, small = chat.scores
    assert (source.kl, source.agreement) == (None, None)
    for number, score in enumerate(chat.scores):
        assert score.nll == pytest.approx(torch.cat(nll[number]).mean().item(), abs=1e-4)
    for number, score in ((1, exact), (2, small)):
        assert score.kl == pytest.approx(torch.cat(kl[number]).mean().item(), abs=1e-5)
        assert score.agreement == pytest.approx(torch.cat(same[number]).float().mean().item())
    assert exact.kl < 1e-5 < small.kl
    assert exact.agreement == 1


def test_questions_are_many_and_short(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "source")
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 24
    # This tokenizer knows few words.
    assert max(len(tokenizer(question)["input_ids"]) for question in QUESTIONS) < LONGEST_QUESTION / 2


def test_a_tokenizer_without_a_template_is_refused(folders, tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = source / name
        if path.suffix == ".jinja":
            path.unlink(missing_ok=True)
        else:
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    request = EvalRequest(source=str(source), converted=(str(folders / "exact"),), device="cpu", chat_prompts=1)
    with pytest.raises(
        UsageError, match=r"^--chat-prompts needs a chat template, and the tokenizer of .*source has no"
    ):
        evaluate(request)


def test_what_a_template_makes_too_long_is_refused(folders, tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "mill " * 400 + CHAT_TEMPLATE
    tokenizer.save_pretrained(source)
    request = EvalRequest(source=str(source), converted=(str(folders / "exact"),), device="cpu", chat_prompts=1)
    with pytest.raises(UsageError, match=r"A question has \d+ tokens with what the chat template of .* room for 384"):
        evaluate(request)


def test_what_cannot_be_asked_is_refused(folders):
    with pytest.raises(UsageError, match=f"There are {len(QUESTIONS)} questions, but --chat-prompts is 1000: lower it"):
        evaluate(ask(folders, "exact", chat_prompts=1000))
    with pytest.raises(UsageError, match="--chat-prompts compares a source with conversions of it: pass CONVERTED"):
        evaluate(ask(folders, chat_prompts=1))
    with pytest.raises(UsageError, match="lower --greedy-tokens, which is 684"):
        evaluate(ask(folders, "exact", chat_prompts=1, greedy_tokens=300))
