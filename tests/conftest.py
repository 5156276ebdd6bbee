"""Fixtures that every test may use; checkpoints come from ``tests.factory``."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.factory import TEXT, tiny_checkpoint
from tests.support.untrained import (  # noqa: F401
    deepseek,
    llama,
    own_cache,
    speakers,
    speaking,
    text,
    tokenizer,
    windows,
)


def pytest_configure() -> None:
    """Take one thread, here and in processes that tests start: on tiny tensors threads only wait for each other."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: compressed ones hold the time, and all workers must collect the same tests."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of a few thousand tokens, in which each word depends on the one before it."""
    words = sorted({word.strip('.,;:"') for word in TEXT.lower().split()})
    chooser = random.Random(0)
    followers = {word: chooser.sample(words, 4) for word in words}

    def sentence() -> str:
        chain = [chooser.choice(words)]
        while len(chain) < chooser.randint(6, 14):
            chain.append(chooser.choice(followers[chain[-1]]))
        return " ".join(chain) + "."

    paragraphs = [" ".join(sentence() for _ in range(6)) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cli() -> Callable:
    """Run a ``transmla`` command in this process: ``cli("convert", source, output).exit_code``."""
    from typer.testing import CliRunner

    from transmla.cli.app import app

    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def exact_pair(tmp_path_factory: pytest.TempPathFactory, cli: Callable) -> tuple[Path, Path]:
    """A tiny Llama and the same model as MLA."""
    root = tmp_path_factory.mktemp("pair")
    source = tiny_checkpoint(root / "source")
    result = cli("convert", source, root / "mla", "--exact", "-q")
    assert result.exit_code == 0, result.stderr
    return source, root / "mla"
