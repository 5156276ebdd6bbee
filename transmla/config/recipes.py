"""The recipes that come with the package: found by name, listed, and copied."""

from __future__ import annotations

import re
from pathlib import Path

import transmla
from transmla.errors import OutputError, UsageError


def recipes_folder() -> Path:
    """Return where the shipped recipes lie: in the installed package, or at the root of a checkout."""
    package = Path(transmla.__file__).parent
    return next(folder for folder in (package / "recipes", package.parent / "configs") if folder.is_dir())


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes by command and name, as ``convert/third``."""
    folder = recipes_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


def purpose(path: Path) -> str:
    """Return what a recipe is for: the first sentence of the comment at its top."""
    comment = path.read_text(encoding="utf-8").removeprefix("# ").replace("\n#\n", " ").replace("\n# ", " ")
    return re.split(r"(?<=\.)\s", comment)[0]


def find_recipe(name: str, command: str) -> Path:
    """Return the file that ``--config`` names: a path, or the name of a recipe that is shipped for a command.

    Raises:
        UsageError: there is neither; which recipes there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json") or path.exists():
        return path
    recipes = shipped_recipes()
    if found := recipes.get(f"{command}/{name}") or recipes.get(name):
        return found
    own = [key.partition("/")[2] for key in recipes if key.startswith(f"{command}/")]
    known = f"; shipped for {command}: {', '.join(own)}" if own else ""
    raise UsageError(f"--config {name} is neither a file nor a shipped recipe{known}.")


def copy_recipe(name: str, target: Path) -> Path:
    """Copy a shipped recipe to a file, or into a folder, and return where it is.

    Raises:
        UsageError: there is no such recipe; which there are.
        OutputError: there is a file already, or none can be written.
    """
    recipes = shipped_recipes()
    found = [path for key, path in recipes.items() if name in (key, key.partition("/")[2])]
    if len(found) != 1:
        raise UsageError(f"There is no recipe {name!r}: take one of {', '.join(recipes)}.")
    path = target / found[0].name if target.is_dir() else target
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(found[0].read_text(encoding="utf-8"))
    except FileExistsError:
        raise OutputError(f"{path} exists already: choose another name.") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from None
    return path
