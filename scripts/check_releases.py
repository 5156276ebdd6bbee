"""Are there newer releases of the libraries than were tested? Asks the package index that pip is set up for.

Usage: python scripts/check_releases.py [--json]; exit code 1 if a library has one, 2 if the index cannot be asked.
A scheduled workflow runs it (.github/workflows/releases.yml); the tests never ask an index.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable

from transmla.versions import NEWEST_TESTED, is_newer


def ask_index(name: str) -> str:
    """Return what pip tells of a library's releases.

    Raises:
        OSError: it could not find out.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["pip said nothing"])[-1])
    return done.stdout


def newest_release(said: str) -> str:
    """Return the newest final release in what pip tells; the first line is ``name (version)``.

    Raises:
        OSError: there is none.
    """
    found = re.match(r"\S+ \(([^)]+)\)", said)
    if found is None:
        raise OSError(f"pip tells of no release: {said[:80]!r}")
    return found[1]


def compare(ask: Callable[[str], str]) -> list[dict[str, str | bool]]:
    """Compare each library's newest release with the tested one."""
    rows = []
    for name, tested in NEWEST_TESTED.items():
        newest = newest_release(ask(name))
        rows.append({"library": name, "tested": tested, "newest": newest, "newer": is_newer(newest, tested)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    as_json = parser.parse_args().json
    try:
        rows = compare(ask_index)
    except OSError as error:
        print(f"The package index cannot be asked: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print("{library:14} tested {tested:8} newest {newest:10}".format(**row), "NEWER" if row["newer"] else "")
    if not (newer := [str(row["library"]) for row in rows if row["newer"]]):
        return 0
    print(
        f"Not tested yet: {', '.join(newer)}. Make a constraints file of the new releases, run scripts/test.sh with "
        "it, and raise transmla/versions.py.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
