"""A model that is judged: it is loaded when something must be computed, and not when everything is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from transmla.checkpoint.source import Source
from transmla.checkpoint.stamps import Stamp, model_stamp
from transmla.errors import CheckpointError
from transmla.modeling.load import load_model


@dataclass
class LazyModel:
    """A model at hand.

    Attributes:
        found: where it is.
        fingerprint: the hash of all that decides what it says.
        dtype: type in which it runs.
        device: where it runs.
        batch_size: of its passes, which decides how sums are rounded.
        stamp: of its files, from before the hash was taken.
    """

    found: Source
    fingerprint: str
    dtype: str
    device: torch.device
    batch_size: int
    stamp: Mapping[str, Stamp]
    _model: PreTrainedModel | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Return what the user calls it."""
        return self.found.name

    @property
    def model(self) -> PreTrainedModel:
        """Return the model, loaded.

        Raises:
            CheckpointError: it cannot be, or is not what the fingerprint was taken of any more.
        """
        if self._model is None:
            self._model = load_model(self.found, dtype=self.dtype, device=self.device)
            if model_stamp(self.found.folder) != self.stamp:
                raise CheckpointError(
                    f"{self.name} was changed while it was evaluated: evaluate it again when it is complete."
                )
        return self._model

    @property
    def key(self) -> dict[str, str | int]:
        """Return what a result of this model depends on."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {"model": self.fingerprint, "dtype": self.dtype, "device": device, "batch_size": self.batch_size}

    def unload(self) -> None:
        """Make room for another."""
        self._model = None
