"""A table of short words, which terminal, HTML report and model card lay out alike; and how numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path


@dataclass(frozen=True)
class TextTable:
    """A table: the first column holds names, the others mostly numbers."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Shown:
    """What tables and plots have in common.

    Attributes:
        names: of the models, the source first, as short as tells them apart.
        full_names: as the report has them.
        dtype: in which the models ran.
        kv_bytes_per_token: of each model, where it was measured.
    """

    names: tuple[str, ...]
    full_names: tuple[str, ...]
    dtype: str
    kv_bytes_per_token: tuple[int, ...]


def short_names(names: Sequence[str]) -> list[str]:
    """Return as much of the ends of paths as tells them apart."""
    for count in range(1, 1 + max(len(Path(name).parts) for name in names)):
        short = ["/".join(Path(name).parts[-count:]) for name in names]
        if len(set(short)) == len(set(names)):
            break
    return short


def with_error(value: float | None, error: float | None, *, share: bool, sign: str = "") -> str:
    """Write a value with its standard error."""
    if value is None:
        return "-"
    write = f"{{:{sign}.1%}}".format if share else partial(number_of, sign=sign)
    return write(value) + ("" if error is None else f" ±{error:.1%}" if share else f" ±{number_of(error)}")


def number_of(value: float, sign: str = "") -> str:
    """Write a number that may be of any size."""
    return format(value, f"{sign}.4f" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{sign}.4g")


def small(value: float | None, sign: str = "") -> str:
    """Write a number with four decimals, and a tiny one with its exponent."""
    if value is None:
        return "-"
    return format(value, f"{sign}.4f" if value == 0 or abs(value) >= 1e-3 else f"{sign}.0e")


def percent(value: float | None) -> str:
    """Write a share in percent."""
    return "-" if value is None else f"{value:.1%}"


def counted(count: int) -> str:
    """Write a large count with its unit."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
