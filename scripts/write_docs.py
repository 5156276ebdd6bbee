"""Write what the documentation repeats of the code: the command line, recipes, families, engines and measured sizes.

    python scripts/write_docs.py [--check]

Each page has its generated part between two comments; what stands around them is written by hand. With ``--check``
nothing is written, and the exit code is 1 where a page is not what would be written. The formats of data files in
docs/guides/data.md are measured, by tests/data/test_files.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic.fields import FieldInfo

from transmla.arch.families import FAMILIES
from transmla.arch.refused import LATER, REFUSED
from transmla.cli.app import app
from transmla.config import REQUESTS
from transmla.config.recipes import purpose, shipped_recipes
from transmla.convert.excess import MEASURED, excess_factor, miss
from transmla.deepseek.engines import ENGINES

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- written by scripts/write_docs.py: {} -->", "<!-- end -->"


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(headings)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def code(value: object) -> str:
    """Return a value as Markdown code, and nothing for none."""
    return "" if value in (None, "", ()) else f"`{value}`"


def cli() -> str:
    """Return every command with its arguments and flags, as the parser has them."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n\n".join(_command(name, commands[name]) for name in commands)


def _command(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    flags = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join(["transmla", name, *(argument.name.upper() for argument in arguments), "[OPTIONS]"])
    rows = [
        *((code(argument.name.upper()), "", argument.help or "") for argument in arguments),
        *((", ".join(map(code, _spellings(flag))), _choices(flag), flag.help or "") for flag in flags),
    ]
    return f"## transmla {name}\n\n{command.help}\n\n```text\n{usage}\n```\n\n" + table(("", "values", "meaning"), rows)


def _spellings(flag: Any) -> list[str]:
    return sorted((*flag.opts, *flag.secondary_opts), key=lambda word: not word.startswith("--"))


def _choices(flag: Any) -> str:
    """Return the words that a flag takes, where it does not take any."""
    metavar = flag.metavar or ""
    return ", ".join(map(code, metavar.strip("[]").split("|"))) if metavar.startswith("[") else ""


def recipes() -> str:
    """Return the shipped recipes with what each is for, and the keys that a recipe of each command may have."""
    shipped = [
        (code(name), purpose(path), ", ".join(map(code, _keys(path)))) for name, path in shipped_recipes().items()
    ]
    keys = (
        f"## Keys of transmla {command}\n\n"
        + table(
            ("key", "default", "meaning"),
            ((code(name), code(_default(info)), info.description or "") for name, info in request.model_fields.items()),
        )
        for command, request in REQUESTS.items()
    )
    return "\n\n".join(["## Shipped recipes\n\n" + table(("recipe", "what it is for", "keys"), shipped), *keys])


def _keys(path: Path) -> list[str]:
    return list(yaml.safe_load(path.read_text(encoding="utf-8")))


def _default(info: FieldInfo) -> object:
    if info.is_required():
        return "required"
    found = info.get_default(call_default_factory=True, validated_data={})
    return " ".join(map(str, found)) if isinstance(found, tuple) else found if found != {} else None


def families() -> str:
    """Return what is converted, what could be and is not yet, and what is refused, with the reason."""
    converted = table(
        ("family", "`model_type`", "biases on", "norm on queries and keys", "mixture of experts"),
        (
            (
                family.title,
                code(model_type),
                ", ".join(map(code, family.biased)) + (f" (by {code(family.bias_key)})" if family.bias_key else ""),
                "yes" if family.head_norms else "",
                "yes" if family.experts else "",
            )
            for model_type, family in FAMILIES.items()
        ),
    )
    later = table(("`model_type`", "why not yet"), ((code(name), why) for name, why in LATER.items()))
    refused = table(("`model_type`", "why not"), ((code(name), why) for name, why in REFUSED.items()))
    return "\n\n".join(
        [
            f"## Converted\n\n{converted}",
            f"## Not converted yet\n\n{later}",
            f"## Refused: DeepSeek-V3 cannot hold them\n\n{refused}",
        ]
    )


def engines() -> str:
    """Return what each engine takes."""
    rows = (
        (
            engine.title,
            code(f"--engine {name}"),
            " or ".join(f"{latent} + {rotary}" for latent, rotary in engine.caches) or "any",
            " or ".join("/".join(map(str, sizes)) for sizes in engine.heads) or "any",
            ", ".join(engine.profiles),
            ", ".join(("plain", *engine.scaled_ropes)) + ("; a frequency for every slot" if engine.free_grid else ""),
            "yes" if engine.biases else "",
            "" if engine.max_layers is None else str(engine.max_layers),
            "needed" if engine.shared_expert else "",
        )
        for name, engine in ENGINES.items()
    )
    return table(
        (
            "engine",
            "flag",
            "latent + rotary",
            "heads: nope/rope/value",
            "profiles",
            "RoPE",
            "biases",
            "layers at most",
            "shared expert",
        ),
        rows,
    )


def measured() -> str:
    """Return what the predictions of excess are made of, and how far off they are there."""
    rows = (
        (
            size.model,
            size.text,
            f"{size.qk_rope_head_dim} + {size.kv_lora_rank}",
            *(f"{error:.4f}" for error in (size.key_error, size.value_error, math.sqrt(size.squared_error))),
            f"{size.excess:.3f}",
            f"{size.excess / size.squared_error:.0f}",
            f"{miss(size):+.0%}",
        )
        for size in MEASURED
    )
    headings = ("model", "text", "rotary + latent", "key error", "value error", "error", "excess", "c", "off by")
    return f"{table(headings, rows)}\n\n`c` is {excess_factor():.0f}, from all of them."


PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "reference/cli.md": ("the command line", cli),
    "reference/recipes.md": ("recipes", recipes),
    "guides/families.md": ("families", families),
    "guides/engines.md": ("engines", engines),
    "concepts/algorithm.md": ("measured sizes", measured),
}


def written(page: str, text: str) -> str:
    """Return the text of a page with its generated part as it should be."""
    title, render = PAGES[page]
    begin = BEGIN.format(title)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise SystemExit(f"docs/{page} lacks {begin} … {END}")
    return f"{before}{begin}\n{render()}\n{END}{after}"


def main() -> int:
    """Write all pages, or say which are not as they would be written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        path = ROOT / "docs" / page
        text = path.read_text(encoding="utf-8")
        if text != (new := written(page, text)):
            stale.append(f"docs/{page}")
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale and check:
        print(f"Out of date: {', '.join(stale)}; run python scripts/write_docs.py", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
