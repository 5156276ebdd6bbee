"""Every ``$ transmla …`` line of README and docs is one that the command line takes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from transmla.cli.app import app
from transmla.config import Request

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def command_lines(text):
    """The lines of a page that begin with ``$ transmla``, with those that a backslash joins to them."""
    joined = text.replace("\\\n", " ")
    return [line.strip().removeprefix("$ ") for line in joined.splitlines() if line.strip().startswith("$ transmla ")]


def parse(line, monkeypatch):
    """Run a line up to the request that it makes, and return what the command line made of it."""
    build = Request.build.__func__
    made = []

    def stop(cls, **choices):
        made.append(build(cls, **choices))
        raise typer.Exit

    monkeypatch.setattr(Request, "build", classmethod(stop))
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    return made[0] if made else None, result


LINES = [(page, line) for page in PAGES for line in command_lines(page.read_text(encoding="utf-8"))]


def test_lines_are_found_and_joined():
    page = "text\n```console\n$ transmla convert A B \\\n    --exact\n  $ transmla eval A\n$ pip install x\n```\n"
    assert [shlex.split(line) for line in command_lines(page)] == [
        ["transmla", "convert", "A", "B", "--exact"],
        ["transmla", "eval", "A"],
    ]
    assert {page.name for page, _ in LINES} >= {"README.md"}


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page.name}: {line[:40]}" for page, line in LINES])
def test_every_command_line_is_taken(page, line, monkeypatch):
    request, result = parse(line, monkeypatch)
    assert (result.exit_code, result.stderr) == (0, "")
    assert request is not None


@pytest.mark.parametrize(
    "line", ["transmla convert A B --kv-ration 0.3", "transmla convert A B --dtype float8", "transmla convrt A B"]
)
def test_others_are_not_taken(line, monkeypatch):
    request, result = parse(line, monkeypatch)
    assert request is None
    assert result.exit_code == 2
