"""Tasks: the items' scores against plain loops, lm-eval's own command line, and what the differences are worth."""

import json
import math
import random
import shutil
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from transformers import GenerationMixin
from transformers.utils import logging

from transmla.cli.progress import Bars, choose_progress
from transmla.config import EvalRequest
from transmla.errors import DataError, UsageError
from transmla.evaluate.run import evaluate
from transmla.evaluate.tasks.scores import task_score

pytestmark = pytest.mark.usefixtures("own_cache")

WORDS = ["quick", "brown", "lazy", "dogs", "counts", "fox"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root, chance = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def write(name, items):
        (root / name).write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")

    write(
        "choose.jsonl",
        [
            {"query": f"Line {i}: the", "choices": chance.sample(WORDS, 3), "gold": chance.randrange(3)}
            for i in range(30)
        ],
    )
    write(
        "swap.jsonl",
        [
            {
                "contexts": [f"Line {i}: the {a}", f"Line {i}: the {b}"],
                "continuation": f"{c} dogs.",
                "gold": chance.randrange(2),
            }
            for i in range(20)
            for a, b, c in [chance.sample(WORDS, 3)]
        ],
    )
    write("finish.jsonl", [{"query": "Line 1:", "answer": "the"}, {"query": "Line 2: the", "answer": "fox"}])
    return root


def ask(speakers, *tasks, **options):
    return EvalRequest(
        source=str(speakers / "source"),
        converted=(str(speakers / "converted"),),
        tasks=tuple(map(str, tasks)),
        device="cpu",
        **options,
    )


def logprob(model, tokenizer, context, continuation):
    """Return the log-probability of a continuation, by one pass over both."""
    before = tokenizer(context)["input_ids"]
    tokens = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        logprobs = model(tokens).logits[0, :-1].double().log_softmax(-1)
    picked = logprobs.gather(-1, tokens[0, 1:, None])[:, 0]
    greedy = (logprobs.argmax(-1) == tokens[0, 1:])[len(before) - 1 :].all().item()
    return picked[len(before) - 1 :].sum().item(), greedy


def right(item, model, tokenizer):
    if "choices" in item:
        found = [logprob(model, tokenizer, item["query"], f" {choice}")[0] for choice in item["choices"]]
    elif "contexts" in item:
        found = [logprob(model, tokenizer, context, f" {item['continuation']}")[0] for context in item["contexts"]]
    else:
        return logprob(model, tokenizer, item["query"], f" {item['answer']}")[1]
    return found.index(max(found)) == item["gold"]


def test_items_are_judged_as_a_plain_loop_does(speakers, files, llama, deepseek, tokenizer):
    report = evaluate(ask(speakers, *(files / f"{name}.jsonl" for name in ("choose", "swap", "finish"))))
    found = {task.task: task for task in report.tasks if task.metric == "acc"}
    assert set(found) == {"choose", "swap", "finish"}
    assert {task.metric for task in report.tasks if task.task == "choose"} == {"acc", "acc_norm"}
    for name, task in found.items():
        items = [json.loads(line) for line in (files / f"{name}.jsonl").read_text().splitlines()]
        ours, theirs = ([right(item, model, tokenizer) for item in items] for model in (deepseek, llama))
        source, converted = task.scores
        assert task.num_items == len(items)
        assert source.value == sum(theirs) / len(items)
        assert converted.value == sum(ours) / len(items)
        difference = torch.tensor(ours).double() - torch.tensor(theirs).double()
        assert converted.difference == pytest.approx(difference.mean().item())
        assert converted.difference_se == pytest.approx(difference.std().item() / math.sqrt(len(items)))


def test_scores_are_those_of_lm_evals_command_line(speakers, files, tmp_path):
    (tmp_path / "choose_yaml.yaml").write_text(
        f"""
task: choose_yaml
dataset_path: json
dataset_kwargs:
  data_files:
    test: {files / "choose.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""
    )
    report = evaluate(ask(speakers, tmp_path / "choose_yaml.yaml", batch_size=4))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={speakers / 'converted'},dtype=float32"]
    command += ["--tasks", "choose_yaml", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    [path] = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(path.read_text())["results"]["choose_yaml"]
    for task in report.tasks:
        assert task.scores[1].value == pytest.approx(theirs[f"{task.metric},none"], abs=1e-12)
        assert task.scores[1].standard_error == pytest.approx(theirs[f"{task.metric}_stderr,none"], rel=1e-6)


def test_what_is_known_is_not_asked_again(speakers, files, monkeypatch):
    request = ask(speakers, files / "choose.jsonl", limit=5)
    first = evaluate(request)
    assert first.tasks[0].num_items == 5
    with monkeypatch.context() as patch:
        patch.setattr("transmla.evaluate.parts.tasks.run_task", lambda *_, **__: pytest.fail("It is asked again."))
        assert evaluate(request) == first
        with pytest.raises(pytest.fail.Exception):
            evaluate(request.model_copy(update={"limit": 6}))


def test_a_generating_task_hears_what_generate_hears(speakers, tmp_path, capsys):
    """One answer for each item, by the model's own penalties; and what is set aside is told once for each model."""
    items = [{"question": f"Line {number}: the", "answer": "x"} for number in range(3)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = tmp_path / "write.yaml"
    task.write_text(
        f"task: write\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'items.jsonl'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['@@'], max_gen_toks: 6}\nmetric_list:\n  - metric: exact_match\n"
    )
    for name in ("source", "converted"):
        shutil.copytree(speakers / name, tmp_path / name)
        asked = {"num_beams": 3, "num_return_sequences": 2, "use_cache": False, "suppress_tokens": [5]}
        (tmp_path / name / "generation_config.json").write_text(json.dumps(asked))
    seen = {}
    generate = GenerationMixin.generate

    def watched(model, *args, **kwargs):
        output = generate(model, *args, **kwargs)
        seen[type(model).__name__] = (len(output), model.generation_config.suppress_tokens)
        return output

    with patch.object(GenerationMixin, "generate", watched):
        report = evaluate(ask(tmp_path, task), progress=Bars(Console(stderr=True)))
    assert [task.metric for task in report.tasks] == ["exact_match"]
    assert seen == {"LlamaForCausalLM": (1, [5]), "DeepseekV3ForCausalLM": (1, [5])}
    assert capsys.readouterr().err.count("Set aside from generation_config.json of") == 2 * 3


def test_a_quiet_evaluation_is_quiet(speakers, files, capsys):
    try:
        evaluate(ask(speakers, files / "choose.jsonl", limit=5), progress=choose_progress(quiet=True))
    finally:
        logging.enable_progress_bar()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "What?", "gold": 0}\n', "has items of gold, question; needed are query, choices, gold; or"),
        ("not JSON\n", "cannot be read"),
        (None, "There is no task file"),
    ],
)
def test_files_that_are_no_tasks_are_refused(speakers, tmp_path, content, message):
    if content is not None:
        (tmp_path / "task.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        evaluate(ask(speakers, tmp_path / "task.jsonl"))


def test_tasks_that_nobody_knows_are_refused(speakers):
    with pytest.raises(DataError, match="lm-eval cannot run the task no_such_task_anywhere: "):
        evaluate(ask(speakers, "no_such_task_anywhere"))


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_what_begins_the_texts_of_tasks_is_told(speakers, files, bos):
    told: list[str] = []
    request = EvalRequest(source=str(speakers / "source"), tasks=(str(files / "choose.jsonl"),), limit=2, bos=bos)
    evaluate(request, tell=told.append)
    sentence = "--bos never does not reach --tasks, whose texts begin as the tokenizer has them."
    assert told == ([] if bos == "auto" else [sentence])


def test_tasks_need_lm_eval(speakers, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"--tasks needs lm-eval: pip install 'transmla\[eval\]'"):
        evaluate(ask(speakers, files / "choose.jsonl"))


def test_differences_are_told_from_noise():
    chance = random.Random(0)
    source = [float(chance.random() < 0.6) for _ in range(1000)]
    # Flips in both directions alike are noise, though 10 % of the items change; all in one direction are not.
    flipped = [float(bool(value) != (number % 10 == 0)) for number, value in enumerate(source)]
    worse = [value * (number % 10 != 0) for number, value in enumerate(source)]
    assert task_score("a", flipped, source).p_value > 0.05
    assert task_score("a", worse, source).p_value < 1e-6
    assert task_score("a", source, source).p_value == 1
    assert task_score("a", [1.0], [0.0]).p_value is None


def test_the_p_value_is_right_as_often_as_it_says():
    """Of models that are as good as each other, one in 20 differs this much."""
    chance = random.Random(1)
    below = 0
    for _ in range(2000):
        source, other = ([float(chance.random() < 0.5) for _ in range(200)] for _ in range(2))
        below += task_score("a", other, source).p_value < 0.05
    assert 60 < below < 150
