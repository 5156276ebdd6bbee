"""The arrows between the rooms of the package, read off every import statement, wherever it stands.

cli → evaluate → convert | finetune | bench | generate | verify → modeling | calibration → deepseek | data →
arch | checkpoint → config | linalg → records → errors | old_names
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "transmla"

# From the top: a room may import what lies below its own floor, and nothing beside it.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"evaluate"},
    {"convert", "finetune", "bench", "generate", "verify"},
    {"calibration", "modeling"},
    {"deepseek", "data"},
    {"arch", "checkpoint"},
    {"config", "linalg"},
    {"progress", "device", "versions"},
    {"records"},
    {"errors", "old_names"},
)
# Stricter than the floors.
MAY_ONLY_IMPORT = {
    "arch": {"config", "errors"},
    "checkpoint": {"config", "progress", "records", "errors"},
    "deepseek": {"config", "linalg", "arch", "errors"},
    "modeling": {"linalg", "deepseek", "data", "arch", "checkpoint", "config", "records", "errors"},
    "config": {"errors", "old_names"},
    "linalg": set(),
    "records": {"old_names"},
    "old_names": set(),
    "errors": set(),
}
LIBRARIES_OF_LINALG = {"torch", "jaxtyping", "einops"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    """The first name below the package: a folder, or a module of its own."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(source):
    """Every module that a source text imports, inside functions and ``if TYPE_CHECKING`` too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "write imports in full"
            # `from transmla import errors` imports a room, `from transmla import __version__` does not.
            found |= {
                f"{node.module}.{alias.name}" if node.module == "transmla" else node.module for alias in node.names
            }
    return found


def rooms_imported(source):
    """The rooms of the package that a source text imports."""
    names = {name.split(".")[1] for name in imports_of(source) if name.startswith("transmla.")}
    return names - {"__version__"}


def may_import(room):
    floor = next(index for index, rooms in enumerate(FLOORS) if room in rooms)
    return MAY_ONLY_IMPORT.get(room, set().union(*FLOORS[floor + 1 :]))


def test_imports_are_found_wherever_they_stand():
    source = """
import transmla
from transmla import __version__, device
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import transmla.arch.spec
def later():
    from transmla.linalg.rotary import rotate
    class Deeper:
        def far(self):
            import os.path, torch.nn as nn
"""
    assert rooms_imported(source) == {"device", "arch", "linalg"}
    assert {"os.path", "torch.nn", "typing"} <= imports_of(source)


def test_every_room_has_a_floor():
    assert {room_of(path) for path in MODULES} - {"__init__"} <= set().union(*FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    room, imported = room_of(path), rooms_imported(path.read_text(encoding="utf-8"))
    allowed = set() if room == "__init__" else may_import(room) | {room}
    assert imported <= allowed


def test_errors_import_nothing():
    assert imports_of((PACKAGE / "errors.py").read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "linalg").glob("*.py")), ids=lambda path: path.name)
def test_linalg_knows_tensors_only(path):
    libraries = {name.split(".")[0] for name in imports_of(path.read_text(encoding="utf-8"))}
    assert libraries <= {"transmla", *LIBRARIES_OF_LINALG, *sys.stdlib_module_names}


def test_nothing_is_imported_by_its_name_in_a_string():
    for path in MODULES:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {getattr(node, "id", None) or getattr(node, "attr", None) for node in nodes}
        assert not names & {"__import__", "import_module"}


def python_files():
    return sorted(path for folder in ("transmla", "scripts", "tests") for path in (ROOT / folder).rglob("*.py"))


def test_no_file_is_longer_than_400_lines():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_module_is_called_utils():
    assert not [path for path in python_files() if {"utils", "helpers", "common"} & {path.stem, *path.parts}]
