"""The public Python API: the names of docs/reference/python-api.md, no more and no fewer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import transmla.bench
import transmla.convert
import transmla.errors
import transmla.evaluate
import transmla.finetune
import transmla.generate
import transmla.modeling
import transmla.verify

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "python-api.md"
ROOMS = {
    room.__name__: room
    for room in (
        transmla.bench,
        transmla.convert,
        transmla.evaluate,
        transmla.finetune,
        transmla.generate,
        transmla.modeling,
        transmla.verify,
    )
}


def listed():
    """The names of the page's table, by module."""
    rows = re.findall(r"^\| `(transmla\.\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {module: set(re.findall(r"`(\w+)`", names)) for module, names in rows}


def test_the_page_lists_what_the_rooms_export():
    names = listed()
    assert names.pop("transmla.errors") == {"TransMLAError"}
    assert names == {name: set(room.__all__) for name, room in ROOMS.items()}


@pytest.mark.parametrize(
    ("module", "name"), sorted((module, name) for module, room in ROOMS.items() for name in room.__all__)
)
def test_every_name_can_be_imported(module, name):
    assert callable(getattr(ROOMS[module], name))


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match=r"module 'transmla\.convert' has no attribute 'konvert'"):
        transmla.convert.konvert  # noqa: B018


def test_requests_are_imported_without_pytorch():
    probe = "import sys; from transmla.convert import ConvertRequest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
