"""A model that is judged: it is loaded when something must be computed, and not when everything is known."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from transmla.checkpoint.source import Source
from transmla.modeling.load import load_model


@dataclass
class Subject:
    """A model at hand.

    Attributes:
        found: where it is.
        fingerprint: the hash of all that decides what it says.
        dtype: type in which it runs.
        device: where it runs.
    """

    found: Source
    fingerprint: str
    dtype: str
    device: torch.device
    _model: PreTrainedModel | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Return what the user calls it."""
        return self.found.name

    @property
    def model(self) -> PreTrainedModel:
        """Return the model, loaded.

        Raises:
            CheckpointError: it cannot be.
        """
        if self._model is None:
            self._model = load_model(self.found, dtype=self.dtype, device=self.device)
        return self._model

    @property
    def key(self) -> dict[str, str]:
        """Return what a result of this model depends on."""
        return {"model": self.fingerprint, "dtype": self.dtype, "device": self.device.type}

    def forget(self) -> None:
        """Make room for another."""
        self._model = None
