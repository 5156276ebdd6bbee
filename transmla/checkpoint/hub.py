"""Models on the Hugging Face hub: which of their files are fetched, and what a failure means for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from transmla.checkpoint.contents import TELLING_FILES, no_safetensors
from transmla.checkpoint.model_files import LICENSE_FILES, TOKENIZER_FILES
from transmla.checkpoint.safetensors import INDEX_FILE, TensorHeader
from transmla.errors import CheckpointError

DESCRIPTION_FILES = ("config.json", INDEX_FILE, *TELLING_FILES, *TOKENIZER_FILES, *LICENSE_FILES)
WEIGHT_FILES = ("*.safetensors",)
# Other models and second copies of the weights that lie in the same repository.
_FOREIGN_WEIGHT_FILES = ("*/*.safetensors", "consolidated*.safetensors")


def download(repo_id: str, *, revision: str | None, token: str | None, patterns: tuple[str, ...]) -> Path:
    """Fetch the files that match ``patterns`` into the hub cache and return the folder of the snapshot.

    Raises:
        CheckpointError: the model is unknown, gated or out of reach.
    """
    with _hub_failures(repo_id, revision):
        folder = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=list(patterns),
            ignore_patterns=list(_FOREIGN_WEIGHT_FILES),
        )
    return Path(folder)


def fetch_headers(repo_id: str, *, revision: str | None, token: str | None) -> dict[str, TensorHeader]:
    """Fetch the headers of the weights, by range requests of a few kilobytes for each shard.

    Raises:
        CheckpointError: the model is unknown, gated or out of reach, or has no safetensors weights.
    """
    with _hub_failures(repo_id, revision):
        metadata = HfApi().get_safetensors_metadata(repo_id, revision=revision, token=token)
    return {
        name: TensorHeader(
            name=name,
            shape=tuple(info.shape),
            stored_as=info.dtype,
            file=file,
            offset=info.data_offsets[0],
        )
        for file, content in sorted(metadata.files_metadata.items())
        for name, info in content.tensors.items()
    }


@contextmanager
def _hub_failures(repo_id: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except HFValidationError:
        raise CheckpointError(f"{repo_id} is neither a folder here nor a hub id such as org/name.") from None
    except GatedRepoError:
        raise CheckpointError(
            f"{repo_id} is gated: accept its terms on https://huggingface.co/{repo_id}, then log in with "
            "`hf auth login` or pass --token."
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo_id} is neither a folder here nor a model on the hub that you may read. "
            "Check the spelling; a private model needs --token."
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repo_id} has no revision {revision}; see its branches and tags on the hub.") from None
    except NotASafetensorsRepoError:
        raise CheckpointError(no_safetensors(repo_id)) from None
    # The last ones come of an answer that the hub's library cannot read.
    except (HTTPError, EntryNotFoundError, SafetensorsParsingError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{repo_id} is neither a folder here nor a reachable model on the hub ({type(error).__name__}). "
            "Check the spelling and the connection."
        ) from error
