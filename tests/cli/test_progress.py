import io

from rich.console import Console
from transformers.utils import logging

from transmla.cli.progress import Bars, choose_progress
from transmla.progress import Progress, Silent


def test_a_bar_counts_up_to_its_total():
    shown = io.StringIO()
    bars = Bars(Console(file=shown, width=80))
    with bars.task("Comparing [a/b]", 3) as advance:
        advance(1)
        advance(2)
    assert "Comparing [a/b]" in shown.getvalue()
    assert "3/3" in shown.getvalue()


def test_bars_are_drawn_on_stderr(capsys):
    with choose_progress(quiet=False).task("Working", 1) as advance:
        advance(1)
    assert capsys.readouterr().out == ""


def test_quiet_is_silent(capsys):
    try:
        progress = choose_progress(quiet=True)
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
    assert isinstance(progress, Silent)
    with progress.task("Working", 1) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_both_keep_the_protocol():
    assert isinstance(Bars(), Progress)
    assert isinstance(Silent(), Progress)
