"""Compare what engines have saved with what stock transformers has. Usage: compare.py DIR [DIR …] [--json].

Each folder has transformers.npz and one file for each engine that ran the same checkpoint. Exit code 1 if a
log-probability is off by more than 1e-3, or a token or the cache's size is another one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

TOLERANCE = 1e-3


def compare(result: np.lib.npyio.NpzFile, reference: np.lib.npyio.NpzFile) -> dict:
    # Engines give tokens of no use a log-probability of minus infinity, or none.
    difference = np.abs(result["logprobs"] - reference["logprobs"])
    same = [np.array_equal(a, b) for a, b in zip(result["greedy"], reference["greedy"], strict=True)]
    off = float(difference.max())
    return {
        "version": str(result["version"]),
        "max_logprob_difference": off,
        "prompts": len(same),
        "same_greedy_text": sum(same),
        "cache_bytes_per_token": float(result["bytes_per_token"]),
        # NaN is not within it either.
        "passed": off <= TOLERANCE and all(same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = {}
    for folder in options.folders:
        reference = np.load(folder / "transformers.npz")
        for path in sorted(folder.glob("*.npz")):
            rows[f"{path.stem}, {folder.name}"] = compare(np.load(path), reference)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        table = Table("Engine", "Version", "max |Δ logprob|", "Same text", "Cache bytes/token", "")
        for name, row in rows.items():
            text = f"{row['same_greedy_text']} of {row['prompts']}"
            cache, verdict = f"{row['cache_bytes_per_token']:,.0f}", "ok" if row["passed"] else "DIFFERS"
            table.add_row(name, row["version"], f"{row['max_logprob_difference']:.1e}", text, cache, verdict)
        Console(width=120).print(table)
    sys.exit(not all(row["passed"] for row in rows.values()))


if __name__ == "__main__":
    main()
