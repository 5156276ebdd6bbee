"""Newer releases are noticed, by the script and at run time; no test asks an index."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from transmla import versions
from transmla.versions import NEWEST_TESTED, is_newer, untested

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_releases", ROOT / "scripts" / "check_releases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_newest_constraints_are_what_is_called_tested():
    """One truth in two places: the pins that the suite runs with, and the numbers that the package ships."""
    newest = max(
        (ROOT / "constraints").glob("transformers-*.txt"), key=lambda path: [*map(int, re.findall(r"\d+", path.stem))]
    )
    pins = dict(line.split("==") for line in newest.read_text().splitlines() if not line.startswith("#"))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for name, tested in NEWEST_TESTED.items():
        assert pins[name] == tested or pins[name].startswith(f"{tested}."), name


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda path: path.stem)
def test_every_set_of_versions_pins_what_it_is_named_for(path):
    text = path.read_text()
    assert re.search(rf"^transformers=={re.escape(path.stem.removeprefix('transformers-'))}\.\d+$", text, re.M)
    assert re.search(r"^torch==2\.13\.0$", text, re.M)


@pytest.mark.parametrize(
    ("found", "tested", "newer"),
    [
        ("5.24.0", "5.24", False),
        ("5.24.3", "5.24", False),
        ("5.25.0", "5.24", True),
        ("5.25.0rc1", "5.24", True),
        ("6.0", "5.24", True),
        ("5.9.1", "5.24", False),
        ("0.4.13", "0.4.13", False),
        ("0.4.14", "0.4.13", True),
        ("0.4.13.1", "0.4.13", False),
        ("2.13.0+cpu", "2.13", False),
    ],
)
def test_newer_by_the_numbers_that_count(found, tested, newer):
    assert is_newer(found, tested) is newer


def test_what_is_installed_is_compared_and_what_is_missing_is_not():
    def version_of(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return {"transformers": "99.1.0"}.get(name, NEWEST_TESTED[name])

    assert untested(version_of) == {"transformers": "99.1.0"}
    assert untested(NEWEST_TESTED.__getitem__) == {}


def test_an_untested_release_gets_one_line_and_no_refusal(tmp_path):
    """A process whose transformers calls itself newer."""
    (tmp_path / "run.py").write_text(
        "from importlib import metadata\n"
        "old = metadata.version\n"
        "metadata.version = lambda name: '99.0.0' if name == 'transformers' else old(name)\n"
        "import transmla.versions\n"
        "transmla.versions.untested.__defaults__ = (metadata.version,)\n"
        "from transmla.cli.app import main\n"
        "main()\n"
    )
    command = [sys.executable, tmp_path / "run.py", "inspect", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    lines = done.stderr.splitlines()
    assert lines[0].startswith(
        "Note: newer than tested with this release of transmla: transformers 99.0.0 (tested up to "
    )
    assert len(lines) == 2, done.stderr
    assert lines[1].startswith("Error: "), "the folder is no model, and that is still said"


def test_tested_releases_get_no_line(monkeypatch):
    monkeypatch.setattr(versions, "untested", dict)
    assert versions.untested_notice() is None


def test_the_script_tells_newer_releases(script, monkeypatch, capsys):
    told = {name: f"{name} ({tested})\nAvailable versions: {tested}, 0.1\n" for name, tested in NEWEST_TESTED.items()}
    monkeypatch.setattr(script, "ask_index", told.__getitem__)
    monkeypatch.setattr(sys, "argv", ["check_releases.py"])
    assert script.main() == 0
    assert "NEWER" not in capsys.readouterr().out
    told["peft"] = "peft (1.0.0)\nAvailable versions: 1.0.0\n"
    monkeypatch.setattr(sys, "argv", ["check_releases.py", "--json"])
    assert script.main() == 1
    said = capsys.readouterr()
    assert {row["library"]: row["newer"] for row in json.loads(said.out)} == {name: name == "peft" for name in told}
    assert said.err.startswith("Not tested yet: peft.")
    told["peft"] = "ERROR: no answer"
    assert script.main() == 2
