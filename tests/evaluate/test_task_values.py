"""What tasks come to: every metric, filter and group as lm-eval itself has it, or named with the reason why not."""

import json
import math
import random

import numpy
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from transmla.config import EvalRequest
from transmla.errors import DataError
from transmla.evaluate.report.plots import report_plots
from transmla.evaluate.report.tables import report_tables_of
from transmla.evaluate.run import evaluate

pytestmark = pytest.mark.usefixtures("own_cache")

WORDS = ["quick", "brown", "lazy", "dogs", "counts", "fox"]
NUM_ITEMS = 24

ROLLING = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\n"
LABELS = (
    "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: ['brown', 'lazy']\n"
    "doc_to_target: label\n"
)
THREE = LABELS.replace("['brown', 'lazy']", "['brown', 'lazy', 'fox']")
FINISH = "output_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: 'dogs'\n"
WRITE = (
    "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{page}}'\n"
    "generation_kwargs: {until: ['@@'], max_gen_toks: 6, do_sample: false}\n"
)
FILTERS = (
    "filter_list:\n"
    "  - {name: short, filter: [{function: regex, regex_pattern: '(.)'}, {function: take_first}]}\n"
    "  - {name: whole, filter: [{function: take_first}]}\n"
)
KINDS = {
    "rolling": (ROLLING, ["word_perplexity", "byte_perplexity", "bits_per_byte"]),
    "labels": (LABELS, ["acc", "acc_norm", "acc_bytes", "f1", "mcc", "brier_score"]),
    "mutual": (LABELS, ["acc", "acc_mutual_info"]),
    "three": (THREE, ["acc", "mcc"]),
    "finish": (FINISH, ["perplexity", "acc"]),
    "write": (WRITE, ["exact_match", "bleu", "chrf", "ter"]),
    "filters": (WRITE + FILTERS, ["exact_match"]),
    "repeats": (WRITE + "repeats: 3\n", ["exact_match"]),
}
LOWER = {"word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity", "brier_score", "ter"}


def items(seed=0):
    chance = random.Random(seed)
    return [
        {
            "question": f"Line {number}: the {chance.choice(WORDS)}",
            "page": " ".join(chance.choices(WORDS, k=12)),
            "label": chance.randrange(2),
            "pair": chance.sample(WORDS, 2),
        }
        for number in range(NUM_ITEMS)
    ]


@pytest.fixture
def write_task(tmp_path):
    def write(name, body, metrics, *, rows=None, more=""):
        data = tmp_path / f"{name}.data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in (items() if rows is None else rows)))
        path = tmp_path / f"{name}.yaml"
        lines = [
            f"  - {metric if isinstance(metric, str) and ':' in metric else f'metric: {metric}'}" for metric in metrics
        ]
        path.write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
            f"{body}{more}metric_list:\n" + "".join(f"{line}\n" for line in lines)
        )
        return path

    return write


def ask(speakers, *tasks, converted=True, **options):
    return EvalRequest(
        source=str(speakers / "source"),
        converted=(str(speakers / "converted"),) if converted else (),
        tasks=tuple(map(str, tasks)),
        device="cpu",
        **options,
    )


def of_lm_eval(model, speaking, path, **options):
    """What lm-eval reports by itself: {(task, metric, filter): value}, and the same of its standard errors."""
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=speaking, batch_size=1), tasks=[path.stem], task_manager=manager, **options
    )
    values, errors = {}, {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if chosen:
                (errors if metric.endswith("_stderr") else values)[task, metric.removesuffix("_stderr"), chosen] = value
    return values, errors


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_and_filter_is_what_lm_eval_reports(speakers, llama, deepseek, speaking, write_task, kind):
    path = write_task(kind, *KINDS[kind])
    report = evaluate(ask(speakers, path))
    for number, model in enumerate((llama, deepseek)):
        values, _ = of_lm_eval(model, speaking, path, bootstrap_iters=0)
        ours = {(task.task, task.metric, task.filter): task.scores[number].value for task in report.tasks}
        assert ours == pytest.approx(values, rel=1e-6)
        assert len(ours) == len(KINDS[kind][1]) * (2 if kind == "filters" else 1)
    for task in report.tasks:
        assert task.num_items == NUM_ITEMS
        assert task.higher_is_better is (task.metric not in LOWER)
        for score in task.scores:
            assert score.standard_error is not None
        source, converted = task.scores
        assert converted.difference == pytest.approx(converted.value - source.value)
        assert converted.difference_se is not None


def test_f1_and_mcc_and_their_errors_are_those_of_the_labels(speakers, llama, deepseek, tokenizer, write_task):
    """By one pass a choice, their formulas, and a bootstrap of other draws."""
    rows = items()
    report = evaluate(ask(speakers, write_task("labels", LABELS.replace("['brown', 'lazy']", "pair"), ["f1", "mcc"])))
    gold = numpy.array([row["label"] for row in rows])

    def said(model):
        return numpy.array(
            [
                max(
                    (0, 1),
                    key=lambda label: log_probability(model, tokenizer, row["question"], " " + row["pair"][label]),
                )
                for row in rows
            ]
        )

    answers = [said(model) for model in (llama, deepseek)]
    draws = numpy.random.default_rng(7).integers(NUM_ITEMS, size=(4000, NUM_ITEMS))
    for metric, compute in (("f1", f1), ("mcc", mcc)):
        [task] = [task for task in report.tasks if task.metric == metric]
        replicates = [compute(gold[draws], said[draws]) for said in answers]
        for score, said, found in zip(task.scores, answers, replicates, strict=True):
            assert score.value == pytest.approx(compute(gold[None], said[None])[0])
            assert score.standard_error == pytest.approx(found.std(), rel=0.1)
        # Of the difference on the same items, which is not that of two independent numbers.
        paired = (replicates[1] - replicates[0]).std()
        assert paired != pytest.approx(math.hypot(replicates[0].std(), replicates[1].std()), rel=0.1)
        assert task.scores[1].difference_se == pytest.approx(paired, rel=0.1)


def counts(gold, said):
    return [((gold == a) & (said == b)).sum(-1) for a, b in ((1, 1), (0, 1), (1, 0), (0, 0))]


def f1(gold, said):
    right, wrong, missed, _ = counts(gold, said)
    return 2 * right / numpy.maximum(1, 2 * right + wrong + missed)


def mcc(gold, said):
    right, wrong, missed, rest = counts(gold, said)
    below = numpy.sqrt(1.0 * (right + wrong) * (right + missed) * (rest + wrong) * (rest + missed))
    return numpy.where(below > 0, (right * rest - wrong * missed) / numpy.maximum(below, 1), 0)


def log_probability(model, tokenizer, context, continuation):
    before = tokenizer(context)["input_ids"]
    tokens = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        logprobs = model(tokens).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(-1, tokens[0, 1:, None])[len(before) - 1 :].sum().item()


def test_perplexities_are_those_of_a_plain_loop(speakers, llama, tokenizer, speaking, write_task):
    rows = items()
    report = evaluate(ask(speakers, write_task("rolling", *KINDS["rolling"]), converted=False))
    losses = []
    for row in rows:
        # lm-eval puts the end token in front of a text.
        tokens = torch.tensor([[speaking.eos_token_id, *tokenizer(row["page"])["input_ids"]]])
        with torch.no_grad():
            logprobs = llama(tokens).logits[0, :-1].double().log_softmax(-1)
        losses.append(-logprobs.gather(-1, tokens[0, 1:, None]).sum().item())
    found = {task.metric: task.scores[0].value for task in report.tasks}
    num_bytes = sum(len(row["page"].encode()) for row in rows)
    assert found["word_perplexity"] == pytest.approx(math.exp(sum(losses) / (12 * NUM_ITEMS)), rel=1e-5)
    assert found["byte_perplexity"] == pytest.approx(math.exp(sum(losses) / num_bytes), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / num_bytes / math.log(2), rel=1e-5)


def test_a_group_is_the_mean_of_its_tasks(speakers, llama, speaking, write_task, tmp_path):
    """Weighted by items and not; its error is that of independent tasks; and one that lacks the metric is told."""
    write_task("small", LABELS, ["acc", "f1"], rows=items(1)[:8])
    write_task("large", LABELS, ["acc"], rows=items(2))
    path = tmp_path / "both.yaml"
    path.write_text(
        "group: both\ntask: [small, large]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
        "  - {metric: f1, weight_by_size: false}\n  - {metric: mcc}\n"
    )
    report = evaluate(ask(speakers, path))
    rows = {(task.task, task.metric): task for task in report.tasks}
    assert set(rows) == {("small", "acc"), ("small", "f1"), ("large", "acc"), ("both", "acc"), ("both", "f1")}
    values, _ = of_lm_eval(llama, speaking, path, bootstrap_iters=0)
    for (task, metric), row in rows.items():
        assert row.scores[0].value == pytest.approx(values[task, metric, "none"])
    both, small, large = (rows[task, "acc"].scores for task in ("both", "small", "large"))
    share = 8 / (8 + NUM_ITEMS)
    for score, part, other in zip(both, small, large, strict=True):
        assert score.standard_error == pytest.approx(
            math.hypot(share * part.standard_error, (1 - share) * other.standard_error)
        )
    assert both[1].difference == pytest.approx(share * small[1].difference + (1 - share) * large[1].difference)
    assert rows["both", "acc"].num_items == 8 + NUM_ITEMS


def test_what_a_group_leaves_out_is_told(speakers, write_task, tmp_path, capsys):
    write_task("small", LABELS, ["acc", "f1"], rows=items(1)[:8])
    write_task("large", LABELS, ["acc"])
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [small, large]\naggregate_metric_list:\n  - {metric: f1}\n  - {metric: mcc}\n"
    )
    for _ in range(2):  # What is known already is told again.
        evaluate(ask(speakers, tmp_path / "both.yaml"))
        told = capsys.readouterr().err
        assert told.count("The metric f1 of the group both is that of 1 of its 2 tasks.") == 1
        assert told.count("The metric mcc of the group both is left out: none of its tasks has a value of it.") == 1


@pytest.mark.parametrize(
    ("body", "metric", "reason"),
    [
        (
            THREE.replace("doc_to_target: label", "doc_to_target: '{{ (label + 1) * 1 }}'"),
            "f1",
            "lm-eval cannot compute",
        ),
        (LABELS, "likelihood", "lm-eval cannot compute it"),
        (WRITE, "bypass", "none of its items has a value"),
    ],
)
def test_a_metric_without_a_value_is_told_and_alone_is_an_error(speakers, write_task, capsys, body, metric, reason):
    other = "exact_match" if body is WRITE else "acc"
    if metric == "f1":
        rows = [{**row, "label": number % 3} for number, row in enumerate(items())]
        body = THREE
    else:
        rows = items()
    report = evaluate(ask(speakers, write_task("both", body, [other, metric], rows=rows)))
    assert [task.metric for task in report.tasks] == [other]
    assert f"The metric {metric} of the task both is left out: {reason}" in capsys.readouterr().err
    with pytest.raises(DataError, match=rf"The task \S*alone.yaml has no value for \S*source: The metric {metric} of"):
        evaluate(ask(speakers, write_task("alone", body, [metric], rows=rows)))


CODE = """
def score(items):
    return {"length": float(len(items[1])), "kind": "long"}


def of_two(doc, results):
    written = results[0]
    found = {"length": len(written), "loss": -1.5 * len(written)}
    return found if doc["label"] else {**found, "zeros": float(not len(written))}


def of_one(doc, results):
    return {"loss": -1.5}


def total(items):
    return float(sum(items))


def words(items):
    return "many words"


def nothing(items):
    return float("nan")


def few(docs):
    return docs.filter(lambda doc: False)
"""


def test_functions_of_a_task_are_heard(speakers, write_task, tmp_path, capsys):
    """Their own aggregations have a value and no error; what some items lack is the mean of the others."""
    (tmp_path / "code.py").write_text(CODE)
    metrics = [
        "{metric: length, aggregation: mean, higher_is_better: false}",
        "{metric: loss, aggregation: !function code.total, higher_is_better: false}",
        "{metric: zeros, aggregation: mean, higher_is_better: true}",
        "{metric: length_words, aggregation: mean, higher_is_better: true}",
    ]
    path = write_task("own", WRITE, metrics, more="process_results: !function code.of_two\n")
    report = evaluate(ask(speakers, path))
    rows = {task.metric: task for task in report.tasks}
    assert set(rows) == {"length", "loss", "zeros"}
    assert "The metric length_words of the task own is left out: no document has it." in capsys.readouterr().err
    length, loss = rows["length"].scores, rows["loss"].scores
    assert loss[1].value == pytest.approx(-1.5 * NUM_ITEMS * length[1].value)
    assert (loss[1].standard_error, loss[1].difference_se, loss[1].p_value) == (None, None, None)
    assert loss[1].difference == pytest.approx(loss[1].value - loss[0].value)
    assert rows["zeros"].num_items == sum(not row["label"] for row in items())
    assert not rows["length"].is_share
    assert rows["length"].higher_is_better is False


@pytest.mark.parametrize("function", ["words", "nothing"])
def test_aggregations_that_are_no_number_are_refused(speakers, write_task, tmp_path, function):
    (tmp_path / "code.py").write_text(CODE)
    metric = f"{{metric: loss, aggregation: !function code.{function}, higher_is_better: true}}"
    path = write_task("own", WRITE, [metric], more="process_results: !function code.of_one\n")
    with pytest.raises(DataError, match=r"has no value for \S*source: .*The metric loss of the task own is left out"):
        evaluate(ask(speakers, path))


@pytest.mark.parametrize("rows", [[], None])
def test_a_task_without_documents_is_refused(speakers, write_task, tmp_path, rows):
    (tmp_path / "code.py").write_text(CODE)
    more = "" if rows == [] else "process_docs: !function code.few\n"
    with pytest.raises(DataError, match=r"empty.yaml"):
        evaluate(ask(speakers, write_task("empty", LABELS, ["acc"], rows=rows, more=more)))


def test_shots_that_a_task_does_not_take_are_told(speakers, write_task, capsys):
    path = write_task("zero", LABELS, ["acc"], more="num_fewshot: 0\n")
    evaluate(ask(speakers, path, num_fewshot=3))
    assert "--num-fewshot 3 does not apply to zero" in capsys.readouterr().err


def test_what_lm_eval_cuts_is_told(speakers, write_task, capsys):
    rows = [{**row, "question": row["question"] * 60} for row in items()]
    evaluate(ask(speakers, write_task("long", LABELS, ["acc"], rows=rows), converted=False, limit=3))
    told = capsys.readouterr().err
    assert told.count("lm-eval warns: ") == 1
    assert "exceeds model's maximum length" in told


def test_one_item_has_no_error(speakers, write_task):
    report = evaluate(ask(speakers, write_task("rolling", *KINDS["rolling"]), limit=1))
    for task in report.tasks:
        assert task.num_items == 1
        assert [score.standard_error for score in task.scores] == [None, None]
        assert task.scores[1].p_value is None


def test_a_loss_whose_exponential_is_too_large_is_infinite(speakers, write_task):
    """A page without spaces is one word."""
    rows = [{**row, "page": row["page"].replace(" ", "") * 4} for row in items()]
    report = evaluate(ask(speakers, write_task("rolling", *KINDS["rolling"], rows=rows)))
    rows = {task.metric: task.scores for task in report.tasks}
    assert rows["word_perplexity"][0].value == math.inf
    assert rows["word_perplexity"][1].difference is None
    assert math.isfinite(rows["bits_per_byte"][1].value)
    assert json.loads(report.model_dump_json())["tasks"][0]["scores"][0]["value"] is None
    assert list(report_tables_of(report))
    assert list(report_plots(report))


def test_tables_write_shares_as_shares_and_know_which_way_is_up(speakers, write_task):
    report = evaluate(ask(speakers, *(write_task(name, *KINDS[name]) for name in ("rolling", "labels", "filters"))))
    [sheet] = [sheet for sheet in report_tables_of(report) if sheet.title.startswith("Tasks")]
    cells = {row[0]: row for row in sheet.rows[::2]}
    assert cells["labels (acc)"][3].count("%") == 2
    assert "%" not in cells["rolling (word_perplexity)"][3]
    assert "%" not in cells["labels (mcc)"][3]
    assert {"filters (exact_match, short)", "filters (exact_match, whole)"} <= cells.keys()
    assert any(title.startswith("Tasks") for title, _ in report_plots(report))
