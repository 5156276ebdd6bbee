"""What can go wrong for a user, one class for each kind of remedy.

Every message is one sentence or two: what was found, what is needed, and which flag or command helps.
The command line prints the message alone and leaves with ``exit_code``; a bug keeps its traceback.
"""


def listed(names: tuple[str, ...] | list[str], *, most: int) -> str:
    """Return names for a message, and how many more there are than ``most``; "none" where there are none."""
    shown = ", ".join(name or "''" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "none"


class TransMLAError(Exception):
    """A failure that the user can do something about."""

    exit_code = 1


class UsageError(TransMLAError):
    """Flags or recipe keys that contradict each other or are out of range."""

    exit_code = 2


class UnsupportedModelError(TransMLAError):
    """A model whose attention cannot be held by the target architecture, with the exact reason."""


class CheckpointError(TransMLAError):
    """A checkpoint that is absent, incomplete, or not what its config says."""


class DataError(TransMLAError):
    """Calibration or evaluation text that is absent, unreadable or too short."""


class OutputError(TransMLAError):
    """An output folder that cannot be written, or must not be."""


class BusyError(OutputError):
    """An output folder that another process is writing."""


class PublishedError(OutputError):
    """An output folder that another process has published since this one looked."""


class TrainingError(TransMLAError):
    """A training whose numbers went wrong."""
