"""A process that has imported everything, and forks once for each command, so that hurting a hundred takes a minute.

It reads one JSON object a line (``arguments``, ``fault``, ``limits``), runs the command line in a child, and answers
with the child's exit code, its standard error, and how many boundaries it passed. It has one thread: forking is safe.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR


class Boundaries:
    """Counts what changes files below a folder, and does harm just before one of these changes, or just after it began.

    Python tells an audit hook of every file that is opened, made, renamed, linked or deleted, whoever does it; what is
    written into an open file is counted where somebody waits for the disk.
    """

    def __init__(self, root: Path, at: int | None, harm: Callable[[], None], *, lasting: bool) -> None:
        self.count, self.names = 0, []
        self._root, self._at, self._harm, self._lasting = str(root), at, harm, lasting
        self._awake = True

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._awake or not self._changes(event, arguments):
            return
        self.pass_one(f"{event} {Path(os.fsdecode(arguments[0])).name}")

    def sync(self, descriptor: int, synced: Callable[[int], None] = os.fsync) -> None:
        """Stand in the place of ``os.fsync``."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(self._root):
            self.pass_one(f"sync {Path(path).name}")
        synced(descriptor)

    def pass_one(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self._at or (self._lasting and self._at is not None and self.count > self._at):
            # Harm itself may change files.
            self._awake = False
            try:
                self._harm()
            finally:
                self._awake = True

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes) or not flags & WRITING:
                return False
        elif event in ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.symlink"):
            path = arguments[0]
            if not isinstance(path, str | bytes | os.PathLike):
                return False
        else:
            return False
        return os.fsdecode(path).startswith(self._root)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def broken_disk() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def harm_of(fault: dict[str, Any]) -> Callable[[], None]:
    """Return what a fault does."""
    kind = fault["kind"]
    if kind.startswith("SIG"):
        return lambda: os.kill(os.getpid(), getattr(signal, kind))
    if kind == "truncate":
        return lambda: os.truncate(fault["path"], fault["size"])
    if kind == "replace":
        return lambda: Path(fault["path"]).write_bytes(Path(fault["by"]).read_bytes())
    if kind == "delete":
        return lambda: shutil.rmtree(fault["path"])
    if kind == "clock":
        return jump
    if kind == "memory":
        return lambda: leave_memory(fault["bytes"])
    refusals = {"full disk": no_space, "broken disk": broken_disk, "read-only disk": read_only}
    return refusals.get(kind, lambda: None)


def leave_memory(count: int) -> None:
    """Let the process have some more bytes than it has, and not one beyond."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + count
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def jump() -> None:
    """Put the clock back by a day."""
    import time

    real = time.time
    time.time = lambda: real() - 86400


def child(job: dict[str, Any], answer: Path) -> None:
    """Run the command and leave with its exit code."""
    fault = job.get("fault") or {"kind": "none"}
    lasting = fault["kind"] == "read-only disk"
    boundaries = Boundaries(Path(job["root"]), fault.get("at"), harm_of(fault), lasting=lasting)
    if "after" in fault:
        threading.Timer(fault["after"], harm_of(fault)).start()
    sys.addaudithook(boundaries.hook)
    os.fsync = boundaries.sync
    for name, limit in job.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    from transmla.cli.app import main

    sys.argv = ["transmla", *job["arguments"]]
    code = 70
    try:
        main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        boundaries._awake = False
        answer.write_text(json.dumps({"count": boundaries.count, "names": boundaries.names}))
        sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and say what became of it."""
    with tempfile.TemporaryDirectory() as scratch:
        answer, errors = Path(scratch) / "answer", Path(scratch) / "stderr"
        pid = os.fork()
        if pid == 0:
            with errors.open("wb") as file:
                os.dup2(file.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            child(job, answer)
        _, status, usage = os.wait4(pid, 0)
        passed = json.loads(answer.read_text()) if answer.exists() else {"count": None, "names": []}
        return {
            "code": os.waitstatus_to_exitcode(status),
            "stderr": errors.read_text(errors="replace"),
            "peak_bytes": usage.ru_maxrss * 1024,
            **passed,
        }


def serve() -> None:
    """Answer until the input ends."""
    import torch

    import transmla.cli.app
    import transmla.convert.run
    import transmla.finetune.run
    import transmla.verify.run  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")


if __name__ == "__main__":
    serve()
