"""What values of tasks are worth, and which files are none."""

import random

import pytest

from transmla.errors import DataError
from transmla.evaluate.parts.cost import ModelReport
from transmla.evaluate.parts.tasks import check_tasks
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.report.tables import report_tables_of
from transmla.evaluate.tasks.report import TaskReport, TaskScore
from transmla.evaluate.tasks.scores import Outcome, replicate, score_outcomes, task_score
from transmla.records import Versions


def test_the_bootstrap_of_a_mean_is_the_error_of_a_mean():
    chance = random.Random(3)
    ours, theirs = ([chance.gauss(0, 1) for _ in range(200)] for _ in range(2))
    outcomes = [
        Outcome(
            task="t",
            metric="m",
            filter="none",
            value=sum(values) / 200,
            num_items=200,
            replicates=replicate(mean, values),
        )
        for values in (ours, theirs)
    ]
    [score] = score_outcomes("a", outcomes[:1], outcomes[1:]).values()
    exact = task_score("a", ours, theirs)
    assert score.standard_error == pytest.approx(exact.standard_error, rel=0.1)
    assert score.difference_se == pytest.approx(exact.difference_se, rel=0.1)
    assert score.difference == pytest.approx(exact.difference)
    [same] = score_outcomes("a", outcomes[:1], outcomes[:1]).values()
    assert (same.difference, same.difference_se, same.p_value) == (0, 0, 1)


def mean(values):
    return sum(values) / len(values)


def test_models_that_answer_other_items_are_not_paired():
    ours, theirs = (
        Outcome(task="t", metric="m", filter="none", value=0.5, num_items=2, answered=answered, items=(0.0, 1.0))
        for answered in ("one", "other")
    )
    [score] = score_outcomes("a", [ours], [theirs]).values()
    assert (score.difference, score.difference_se, score.p_value) == (0, None, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"query": "a", "choices": ["b", "c"], "gold": 2}',
            "a gold that is not the index of one of its 2 texts, 2 in line 2",
        ),
        ('{"query": "a", "choices": ["b", "c"], "gold": "b"}', "not the index of one of its 2 texts"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "choices that are not a list of texts in line 2"),
        ('{"query": null, "choices": ["b", "c"], "gold": 0}', "no text under query in line 2"),
        ('{"choices": ["b", "c"], "gold": 0}', "no text under query in line 2"),
        ("[1]", "line 2 is no JSON object"),
    ],
)
def test_an_item_that_is_no_item_is_named_by_its_line(tmp_path, line, message):
    (tmp_path / "task.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        check_tasks([str(tmp_path / "task.jsonl")])


def test_a_file_without_items_is_refused(tmp_path):
    (tmp_path / "task.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"task\.jsonl holds no items"):
        check_tasks([str(tmp_path / "task.jsonl")])


@pytest.mark.parametrize(
    ("up", "change", "verdict"),
    [(True, 1, "better"), (True, -1, "worse"), (False, 1, "worse"), (False, -1, "better"), (None, 1, "other")],
)
def test_a_table_knows_which_way_is_up(up, change, verdict):
    scores = (
        TaskScore(model="source", value=3.0, standard_error=0.1),
        TaskScore(
            model="m", value=3.0 + change, standard_error=0.1, difference=change, difference_se=0.1, p_value=1e-9
        ),
    )
    cost = {"fingerprint": "f", "kv_bytes_per_token": 1, "kv_numbers_per_token_layer": 1, "kv_bytes_computed": 1}
    report = EvalReport(
        models=tuple(ModelReport(name=score.model, num_parameters=1, **cost) for score in scores),
        tasks=(TaskReport(task="t", metric="ppl", num_items=2, higher_is_better=up, is_share=False, scores=scores),),
        dtype="float32",
        device="cpu",
        versions=Versions(transmla="0", torch="0", transformers="0"),
    )
    sheet = next(iter(report_tables_of(report)))
    assert sheet.rows[0][3] == "3.0000 ±0.1000"
    assert sheet.rows[1][-1] == verdict
