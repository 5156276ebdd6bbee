"""Where the output of a command goes."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_output_that_nobody_reads_ends_a_command_in_silence(flags):
    """``transmla ... | head``: the reader is gone before all is written."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "transmla", "recipes", *flags], stdout=pipe, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"")
