"""Uploading a finished output: the repository is looked at before the work, and every file named before it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from transmla.errors import OutputError


def make_repository(repo_id: str, *, token: str | None) -> None:
    """Make sure that ``repo_id`` is there; a new one is private. Hours of work should not end at a spelling mistake.

    Raises:
        OutputError: it cannot be made, or not with this token.
    """
    with _hub_failures(repo_id, "nothing has been computed yet"):
        HfApi(token=token).create_repo(repo_id, private=True, exist_ok=True)


def push(folder: Path, repo_id: str, *, token: str | None, tell: Callable[[str], None]) -> None:
    """Tell what will be uploaded, and upload it as one commit.

    Args:
        folder: of a finished output.
        repo_id: where it goes.
        token: hub token; the logged-in one by default.
        tell: is told, a line at a time.

    Raises:
        OutputError: the hub refuses; the output stays where it is.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    tell(f"Uploading {len(sizes)} files, {sum(sizes.values()):,} bytes, to https://huggingface.co/{repo_id}:")
    for name, size in sizes.items():
        tell(f"  {name}  {size:,}")
    with _hub_failures(
        repo_id, f"the output is complete in {folder}; hf upload {repo_id} {folder} does the same later"
    ):
        HfApi(token=token).upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(sizes), commit_message="Upload by transmla"
        )


@contextmanager
def _hub_failures(repo_id: str, state: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError:
        raise OutputError(f"--push-to-hub {repo_id} is not a hub id such as org/name ({state}).") from None
    except (HTTPError, OSError, ValueError) as error:
        # Not its text, which may repeat what was sent.
        raise OutputError(
            f"{repo_id} cannot be written on the hub ({type(error).__name__}): log in with `hf auth login` or pass a "
            f"--token that may write; {state}."
        ) from None
