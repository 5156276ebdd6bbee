"""An output folder that appears only when it is complete.

The work happens in a hidden sibling, ``.<name>.partial``, on the same file system, so that one rename publishes it::

    .<name>.partial/lock            held by the one process that writes this output
    .<name>.partial/journal.jsonl   what has been finished, to resume a killed run
    .<name>.partial/model/          becomes the output folder
    .<name>.partial/work/           what an interrupted run needs besides, and the output does not
    .<name>.partial/replaced/       an output that --overwrite replaces, for the moment between two renames
"""

from __future__ import annotations

import fcntl
import os
import reprlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from transmla.checkpoint.disk import fsync
from transmla.checkpoint.journal import Identity, Journal
from transmla.errors import BusyError, CheckpointError, OutputError, PublishedError


def check_output(output_dir: Path, *, source_folder: Path | None, overwrite: bool) -> None:
    """Make sure that ``output_dir`` may be created, or replaced.

    Raises:
        OutputError: it is not empty, overlaps the source, or cannot be created.
    """
    output = output_dir.resolve()
    if source_folder is not None:
        source = source_folder.resolve()
        if output.is_relative_to(source) or source.is_relative_to(output):
            raise OutputError(f"{output_dir} and the source {source_folder} overlap; choose a folder outside of it.")
    if os.path.ismount(output):
        raise OutputError(f"{output_dir} is a mount point and cannot appear at once; choose a new folder inside it.")
    ancestor = _nearest_existing(output)
    if not ancestor.is_dir():
        raise OutputError(f"{ancestor} is a file; the output {output_dir} needs a folder there.")
    home = output.parent if ancestor == output else ancestor
    if not os.access(home, os.W_OK | os.X_OK):
        raise OutputError(f"{home} is not writable, so {output_dir} cannot be created; choose another folder.")
    if ancestor == output and any(output.iterdir()):
        if not overwrite:
            raise OutputError(_not_empty(output_dir))
        if not (output / "config.json").is_file():
            raise OutputError(f"{output_dir} does not hold a model, so --overwrite will not delete it.")


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Make sure that ``needed_bytes`` fit on the disk of ``folder``, which need not exist yet.

    Raises:
        OutputError: they do not.
    """
    free = shutil.disk_usage(_nearest_existing(folder.resolve())).free
    if free < needed_bytes:
        raise OutputError(f"{folder} needs {needed_bytes:,} bytes, but its disk has only {free:,} free.")


def reserved_bytes(output_dir: Path) -> int:
    """Return what the files of an interrupted run take on the disk: the next one fills them again, or deletes them."""
    return sum(path.stat().st_blocks * 512 for path in (staging_folder(output_dir) / "model").glob("*"))


def staging_folder(output_dir: Path) -> Path:
    """Return the hidden sibling in which ``output_dir`` is prepared."""
    output = output_dir.resolve()
    return output.with_name(f".{output.name}.partial")


class Staging:
    """The place where one process prepares an output folder; a context manager that ends the lock.

    Leaving it without ``publish`` keeps finished work for a later run, and leaves nothing if there is none, or none
    that could be of use.

    Attributes:
        folder: Where the files of the output are written.
        work: Where there may be files that the output does not need.
        journal: What has been finished.
        resumed: Whether finished work of an interrupted run was found, and its files kept.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        identity: Identity,
        resume: bool = False,
        overwrite: bool = False,
        renamed: Callable[[Identity | None], Identity | None] | None = None,
    ) -> None:
        """Create the staging folder, or take up one that an interrupted run has left.

        Args:
            output_dir: The folder to publish; see ``check_output``.
            identity: Whatever must be equal for the files to be of use again: a digest of the request, or facts by
                name, plain enough for JSON, of which those that differ are then named.
            resume: Keep the finished work of an interrupted run; otherwise it is deleted.
            overwrite: Replace an output that exists when publishing.
            renamed: Gives what an earlier release noted as identity the names of this one.

        Raises:
            BusyError: another process is writing the same output.
            PublishedError: another process has published it meanwhile, and it is not to be replaced.
            OutputError: the work to resume belongs to another request, or the folder cannot be created.
        """
        self._output = output_dir.resolve()
        self._overwrite = overwrite
        self._root = staging_folder(output_dir)
        self.folder, self.work = self._root / "model", self._root / "work"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._restore_replaced()
            if not overwrite and self._output.is_dir() and any(self._output.iterdir()):
                # Whoever held the lock has published since this run looked.
                self.discard()
                os.close(self._lock)
                raise PublishedError(_not_empty(output_dir))
            self.journal = Journal(self._root / "journal.jsonl", check=self.check)
            self.resumed = resume and bool(self.journal.entries) and self.folder.is_dir()
            before = self.journal.identity if renamed is None else renamed(self.journal.identity)
            if self.resumed and before != identity:
                os.close(self._lock)
                raise OutputError(f"The interrupted run in {self._root} {_differences(before, identity)}.")
            if not self.resumed:
                for folder in (self.folder, self.work):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                self.journal.start(identity)
        except OSError as error:
            raise OutputError(f"{self._root} cannot be prepared: {error.strerror}.") from None

    def publish(self) -> None:
        """Rename the finished folder to the output, after everything in it has reached the disk.

        Raises:
            OutputError: the output has come into being meanwhile, the files are another run's by now, or the file
                system refuses.
        """
        self.check()
        replaced = self._root / "replaced"
        try:
            for path in [*self.folder.rglob("*"), self.folder]:
                fsync(path)
            if self._overwrite and self._output.exists():
                os.rename(self._output, replaced)
            try:
                os.rename(self.folder, self._output)
            except OSError:
                self._restore_replaced()
                raise
            fsync(self._output.parent)
        except OSError as error:
            raise OutputError(
                f"{self.folder} is complete but cannot be renamed to {self._output}: {error.strerror}."
            ) from None
        self.discard()

    def check(self) -> None:
        """Make sure that the folder is still this run's: whoever deletes it and starts anew would have two runs in it.

        Raises:
            OutputError: it is not.
        """
        if not self._is_ours():
            raise OutputError(f"{self._root} was deleted or replaced while this run wrote to it; run it again.")

    def discard(self) -> None:
        """Delete whatever has been staged."""
        if self._is_ours():
            shutil.rmtree(self._root, ignore_errors=True)

    def _is_ours(self) -> bool:
        """Return whether the folder is still the one that this process has locked."""
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(self._root / "lock"))
        except OSError:
            return False

    def _take_lock(self) -> int:
        descriptor = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between the two calls the holder may have published and deleted the file that is now locked.
            if not os.path.samestat(os.fstat(descriptor), os.stat(self._root / "lock")):
                raise BlockingIOError
        except BlockingIOError:
            os.close(descriptor)
            raise BusyError(
                f"Another process is writing {self._output}; wait for it or choose another folder."
            ) from None
        return descriptor

    def _restore_replaced(self) -> None:
        """Undo the first of the two renames if the second did not happen."""
        replaced = self._root / "replaced"
        if self._output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        elif replaced.exists():
            os.rename(replaced, self._output)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A source that cannot be used will have to change, and then what was made of it is of no use.
        if not self.journal.entries or isinstance(error, CheckpointError):
            self.discard()
        elif error is not None and self._is_ours():
            error.add_note("Continue with --resume.")
        os.close(self._lock)


def _not_empty(output_dir: Path) -> str:
    return f"{output_dir} is not empty; choose another folder, or replace it with --overwrite."


def _differences(old: Identity | None, new: Identity) -> str:
    """Return what an interrupted run had and this one has not, and what to do."""
    if isinstance(new, dict) and not isinstance(old, dict):
        return "was begun by an earlier version of transmla: start anew without --resume"
    had = "another source, text or settings"
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in old | new if name not in old or name not in new or old[name] != new[name]]
        had = ", ".join(f"{name} {reprlib.repr(old.get(name))} (now {reprlib.repr(new.get(name))})" for name in names)
    return f"had {had}: repeat those, or start anew without --resume"


def _nearest_existing(path: Path) -> Path:
    return path if os.path.exists(path) else _nearest_existing(path.parent)
