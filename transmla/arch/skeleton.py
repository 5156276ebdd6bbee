"""A stock transformers model without weights: names, shapes, and one decoder layer at a time."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from transmla.errors import CheckpointError


@contextmanager
def empty_matrices_are_fine() -> Iterator[None]:
    """Silence PyTorch's warning of the empty matrices that a mixture without shared experts has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        yield


class Skeleton:
    """The architecture of a causal language model on the meta device, where it costs no memory."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Build the skeleton from transformers' own class for ``config``.

        Raises:
            CheckpointError: there is no such model.
        """
        # Only the released code of transformers may define the model, and SDPA needs no mask tensor.
        with torch.device("meta"), empty_matrices_are_fine():
            try:
                self._model = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=False, attn_implementation="sdpa", dtype=torch.float32
                ).eval()
            except Exception as error:  # a config may be wrong in as many ways as there are classes
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise CheckpointError(f"config.json describes no model that can be made ({reason[:300]}).") from error
        self._config = self._model.config
        #: Name and shape of every tensor of a checkpoint, a tied head included.
        self.shapes = {name: tensor.shape for name, tensor in self._model.state_dict().items()}

    @contextmanager
    def module(
        self, path: str, tensors: Mapping[str, Tensor], *, instead: Mapping[str, nn.Module] = MappingProxyType({})
    ) -> Iterator[nn.Module]:
        """Lend the submodule at ``path`` holding ``tensors``, named relative to it, which are not copied.

        Afterwards it is as it was, and empty again: only what is lent takes memory.

        Args:
            path: of the submodule in the model.
            tensors: all that it holds.
            instead: modules that take the place of some inside it, which then hold nothing.
        """
        module = self._model.get_submodule(path)
        own = {name: module.get_submodule(name) for name in instead}
        try:
            for name, other in instead.items():
                module.set_submodule(name, other)
            module.load_state_dict(tensors, assign=True)
            yield module.requires_grad_(False)
        finally:
            for name, submodule in own.items():
                module.set_submodule(name, submodule)
            module.to("meta")

    def rotary(self, device: torch.device) -> nn.Module:
        """Return the model's rotary embedding, computed afresh on ``device``: its tables are in no checkpoint."""
        return type(self._model.get_decoder().rotary_emb)(self._config).to(device)
