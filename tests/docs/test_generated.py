"""What the documentation repeats of the code is what the code says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def check(*arguments):
    command = [sys.executable, "scripts/write_docs.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, encoding="utf-8", check=False
    )


def test_generated_pages_are_up_to_date():
    result = check("--check")
    assert (result.returncode, result.stderr) == (0, "")
