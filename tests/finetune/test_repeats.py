"""Sequences of repeats among what is trained on, and copying that training must not lower."""

import json
from itertools import islice

import pytest

from tests.finetune.test_training import report_of
from transmla.finetune.data.packing import Row
from transmla.finetune.data.repeats import Interleaved, RepeatRows
from transmla.finetune.report import HeldoutPoint, best_point
from transmla.finetune.trainer import FinetuneTrainer

WORDS, WINDOW = range(1000, 1100), 32


def rows(count, learnt=WINDOW):
    """Texts in which each token stands once; what comes after ``learnt`` tokens is padding."""
    return [
        Row(
            list(range(number * WINDOW, (number + 1) * WINDOW))[:learnt] + [0] * (WINDOW - learnt),
            [True] + [False] * (WINDOW - 1),
            [place < learnt for place in range(WINDOW)],
        )
        for number in range(count)
    ]


def make(share, start=()):
    return RepeatRows(WORDS, share=share, start=start, seed="0")


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("start", [(), (7,)])
def test_what_is_learnt_has_been_said_before(last, start):
    given = rows(40)
    found = list(make(0.25, start).among(given, last=last))
    repeats = [row for row in found if not any(row is other for other in given)]
    assert len(repeats) == 10
    assert (found[:40] == given) == last
    for number, row in enumerate(repeats):
        assert len(row.tokens) == WINDOW
        assert row.tokens[: len(start)] == list(start)
        assert not row.splittable
        assert 0 < sum(row.loss_mask) <= WINDOW / 2
        for place, learnt in enumerate(row.loss_mask):
            if learnt:
                assert row.tokens[place] in row.tokens[len(start) : place]
        if number % 2 == 0:
            assert set(row.tokens[len(start) :]) <= set(WORDS)
        else:
            # Of the row before it: the first one of each four.
            assert set(row.tokens[len(start) :]) <= set(given[4 * number + 3].tokens)


@pytest.mark.parametrize(("count", "expected"), [(9, 0), (10, 1), (20, 2), (30, 3), (100, 10)])
def test_a_tenth_is_a_tenth(count, expected):
    assert len(list(make(0.1).among(rows(count), last=True))) == count + expected


def test_padding_is_never_said():
    found = list(make(1.0).among(rows(6, learnt=5), last=True))[6:]
    assert all(0 not in row.tokens for row in found[3::2])


def test_a_stream_has_the_same_repeats_in_each_pass():
    stream = Interleaved(rows(12), make(0.5))
    assert list(stream) == list(stream)
    assert len(list(stream)) == 18
    assert len(list(islice(stream, 3))) == 3


@pytest.mark.parametrize("count", [1, 3, 9])
def test_at_least_one_is_held_out(count):
    given = rows(count)
    assert len(make(0.25).of(given)) == max(1, count // 4)


def point(step, loss, repeat_nll):
    return HeldoutPoint(
        step=step, num_tokens_seen=0, loss=loss, nll=loss, perplexity=1.0, kl=loss, seconds=0.0, repeat_nll=repeat_nll
    )


def test_the_best_step_copies_no_worse_than_the_start():
    points = [point(0, 3.0, 2.0), point(2, 1.0, 2.1), point(4, 2.0, 1.5), point(6, 2.5, 1.9)]
    assert best_point(points).step == 4
    assert best_point(points[:2]).step == 0
    # Nobody has watched it.
    assert best_point([point(0, 3.0, None), point(2, 1.0, None)]).step == 2


REPEATS = "--repeats 0.5 --hard-label-share 0.2 --max-steps 6 --eval-steps 2"


@pytest.mark.parametrize("flags", ["", "--teacher-top-k 50", "--streaming"])
def test_copying_is_watched(train, converted, tmp_path, flags):
    plain = report_of(train(converted, tmp_path / "plain", "--max-steps 1"))
    report = report_of(train(converted, tmp_path / "out", f"{REPEATS} {flags}"))
    assert [point["step"] for point in report["heldout"]] == [0, 2, 4, 6]
    assert all(point["repeat_nll"] > 0 for point in report["heldout"])
    assert report["num_heldout_repeats"] == 4
    assert report["num_heldout_sequences"] == plain["num_heldout_sequences"] == 16
    assert plain["heldout"][0]["repeat_nll"] is None
    if "--streaming" not in flags:
        assert report["num_sequences"] == plain["num_sequences"] + plain["num_sequences"] // 2


def test_without_a_teacher_copying_is_watched_and_nothing_is_surest(cli, train, converted, tmp_path, calibration_text):
    flags = ("--window", "32", "--num-eval-windows", "16", "--max-steps", "1", "--teacher", "none", "-q")
    report = report_of(train_plainly(cli, converted, tmp_path / "out", calibration_text, *flags))
    assert all(point["repeat_nll"] > 0 for point in report["heldout"])
    result = cli(
        "finetune", converted, tmp_path / "x", "--dataset", calibration_text, *flags, "--hard-label-share", "0.2"
    )
    assert result.exit_code == 2
    assert "--hard-label-share and --teacher-top-k need a teacher, and --teacher is none" in result.stderr


def train_plainly(cli, checkpoint, output, text, *flags):
    result = cli("finetune", checkpoint, output, "--dataset", text, *flags)
    assert result.exit_code == 0, result.stderr
    return output


def test_a_veto_is_told(cli, converted, tmp_path, calibration_text, monkeypatch):
    measure = FinetuneTrainer._measure

    def forgetful(self, dataset):
        loss, nll, kl = measure(self, dataset)
        step = self.state.global_step
        return (loss, nll + step, kl) if dataset is self._heldout_repeats else (loss - step, nll, kl)

    monkeypatch.setattr(FinetuneTrainer, "_measure", forgetful)
    flags = ("--window", "32", "--num-eval-windows", "16", "--max-steps", "2", "--eval-steps", "1", "-q")
    result = cli("finetune", converted, tmp_path / "out", "--dataset", calibration_text, *flags)
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "Repeats" in shown
    assert "worse than the start is not published, whatever its loss" in shown
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert report_of(tmp_path / "out")["best_step"] == 0


def test_a_training_that_copies_worse_is_not_published(train, converted, tmp_path, monkeypatch):
    measure = FinetuneTrainer._measure

    def forgetful(self, dataset):
        loss, nll, kl = measure(self, dataset)
        # The text is learnt better and better, and copying is lost after step 2.
        lost = 1.0 if self.state.global_step > 2 else -1.0 if self.state.global_step else 0.0
        return (loss, nll + lost, kl) if dataset is self._heldout_repeats else (loss - self.state.global_step, nll, kl)

    monkeypatch.setattr(FinetuneTrainer, "_measure", forgetful)
    output = train(converted, tmp_path / "out", REPEATS)
    assert report_of(output)["best_step"] == 2
    assert json.loads((output / "transmla_finetune.json").read_text())["steps"] == 6
