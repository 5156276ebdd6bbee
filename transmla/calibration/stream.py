"""The source model on the calibration windows, one decoder layer in memory at a time.

What lives here is the residual stream of every window and one stock transformers decoder layer. A layer's attention is
watched from outside by hooks, so whatever the family does around it, its inputs and outputs are the true ones. Whatever
type the layers' products are computed in, the stream itself is float32: the converted layers learn from differences of
two streams, which half precision would not hold.

A mixture of experts is far larger than all else in its layer. So a stream passes its layer without the experts first,
and notes which token chose which; then each expert is there once and alone, for all tokens of all streams.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transmla.arch.arguments import refuse_arguments
from transmla.arch.experts import EXPERTS, Expert
from transmla.arch.skeleton import Skeleton
from transmla.deepseek.target_spec import TargetSpec


class Attended(NamedTuple):
    """What an attention module saw and said for one batch of windows; queries and keys before RoPE, heads in a row."""

    input: Float[Tensor, "batch tokens hidden"]
    query: Float[Tensor, "batch tokens queries"]
    key: Float[Tensor, "batch tokens keys"]
    value: Float[Tensor, "batch tokens keys"]
    output: Float[Tensor, "batch tokens hidden"]
    residual: Float[Tensor, "batch tokens hidden"]
    """The residual stream with the output added to it."""


class Routed(NamedTuple):
    """What the experts have to add to a batch of a stream."""

    hidden: Float[Tensor, "tokens hidden"]
    inputs: Float[Tensor, "tokens hidden"]
    experts: Int[Tensor, "tokens chosen"]
    weights: Float[Tensor, "tokens chosen"]


class ResidualStream:
    """The residual stream of all windows, in front of the next layer.

    Where the projections of attention have biases, its inputs are given a last entry of one: a bias is a column then.
    """

    def __init__(
        self,
        spec: TargetSpec,
        hidden: Float[Tensor, "windows tokens hidden"],
        *,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        """Start from ``hidden``, which is kept up to date in place; ``dtype`` is that of the products in the layers."""
        self._spec, self._hidden, self._dtype, self._batch_size = spec, hidden, dtype, batch_size
        self._routed: list[Routed] = []

    def hidden(self, rows: slice) -> Float[Tensor, "windows tokens hidden"]:
        """Return the residual stream in front of the next layer; advancing changes it in place."""
        return self._hidden[rows]

    @torch.no_grad()
    def inputs(self, layer: nn.Module, rows: slice) -> Float[Tensor, "windows tokens hidden"]:
        """Return what the attention of the source layer ``layer`` would be given here, in float32."""
        norm = layer.get_submodule(self._spec.family.input_norm.removesuffix(".weight"))
        hidden = self._hidden[rows]
        inputs = hidden.new_ones(*hidden.shape[:2], self._spec.input_size)
        for batch, given in zip(hidden.split(self._batch_size), inputs.split(self._batch_size), strict=True):
            given[..., : hidden.shape[-1]] = norm(batch)
        return inputs

    @torch.no_grad()
    def projected(
        self, layer: nn.Module, rows: slice, names: Iterable[str]
    ) -> Iterator[tuple[Float[Tensor, "_ _ hidden"], dict[str, Float[Tensor, "_ _ _"]]]]:
        """Yield the inputs that attention would be given here, and what these of its projections would make of them.

        Norms on heads are part of a projection.
        """
        attention = layer.get_submodule(self._spec.family.attention)
        for inputs in self.inputs(layer, rows).split(self._batch_size):
            made = {}
            with _products_in(self._dtype, inputs):
                for name in names:
                    made[name] = attention.get_submodule(name)(inputs[..., : self._spec.hidden_size])
                    if name in self._spec.family.head_norms:
                        norm = attention.get_submodule(self._spec.family.head_norms[name])
                        made[name] = norm(made[name].unflatten(-1, (-1, self._spec.head_dim))).flatten(-2)
            yield inputs, made

    def lend(self, expert: Expert) -> Expert:
        """Return an expert on the device and in the type of the products."""
        return expert.to(self._hidden.device, self._dtype)

    @torch.no_grad()
    def add_expert(self, expert: Expert) -> None:
        """Add what an expert of the layer just passed, as :meth:`lend` gives it, makes of the tokens that chose it."""
        for routed in self._routed:
            token, choice = torch.where(routed.experts == expert.index)
            inputs = routed.inputs[token]
            with _products_in(self._dtype, inputs):
                gate, up = nn.functional.linear(inputs, expert.gate), nn.functional.linear(inputs, expert.up)
                made = nn.functional.linear(nn.functional.silu(gate) * up, expert.down)
            routed.hidden.index_add_(0, token, made.float() * routed.weights[token, choice, None])

    def forget_choices(self) -> None:
        """Make room: all experts have been added."""
        self._routed.clear()

    def _pass(
        self, layer: nn.Module, batch: Float[Tensor, "batch tokens hidden"], rotary: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Return what ``layer`` makes of a batch of the stream; it must go there, where the experts will be added."""
        with _products_in(self._dtype, batch):
            after = layer(batch, position_embeddings=rotary)
        if self._spec.mixture:
            later = layer.get_submodule(EXPERTS)
            assert isinstance(later, _ExpertsLater)
            inputs, experts, weights = later.seen
            self._routed.append(Routed(batch.flatten(0, 1), inputs.to(self._dtype), experts, weights.float()))
        return after

    def _with_one(self, inputs: Float[Tensor, "batch tokens hidden0"]) -> Float[Tensor, "batch tokens hidden"]:
        return nn.functional.pad(inputs, (0, 1), value=1.0) if self._spec.biased else inputs


class SourceStream(ResidualStream):
    """The residual stream of the source model."""

    def __init__(
        self,
        skeleton: Skeleton,
        spec: TargetSpec,
        embedding: Float[Tensor, "vocab hidden"],
        windows: Int[Tensor, "windows tokens"],
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        """Embed the windows; ``dtype`` is that of the matrix products in the layers."""
        super().__init__(spec, embedding[windows].to(device, torch.float32), dtype=dtype, batch_size=batch_size)
        self._skeleton, self._device = skeleton, device
        positions = torch.arange(windows.shape[1], device=device).unsqueeze(0)
        self._rotary = skeleton.rotary(device)(self._hidden[:1], positions)

    def fork(self) -> "ConvertedStream":
        """Return a stream of its own that is now equal to this one."""
        return ConvertedStream(
            self._spec, self._hidden.clone(), self._rotary, dtype=self._dtype, batch_size=self._batch_size
        )

    def layer(self, index: int, tensors: Mapping[str, Tensor]) -> AbstractContextManager[nn.Module]:
        """Lend decoder layer ``index`` holding ``tensors``, on the device and in the type of the products.

        Of a mixture they are all but the experts, which :func:`add_experts` adds.
        """
        tensors = {name: tensor.to(self._device, self._dtype) for name, tensor in tensors.items()}
        instead = {EXPERTS: _ExpertsLater()} if self._spec.mixture else {}
        return self._skeleton.module(self._spec.layer_prefix(index).removesuffix("."), tensors, instead=instead)

    @torch.no_grad()
    def advance(self, layer: nn.Module, rows: slice) -> Iterator[Attended]:
        """Send the windows in ``rows`` through ``layer`` and yield what its attention did, batch by batch."""
        attention = layer.get_submodule(self._spec.family.attention)
        seen: dict[str, Tensor] = {}

        def watch_attention(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
            seen["input"] = self._with_one(args[0] if args else kwargs["hidden_states"])
            seen["output"] = output[0]

        def watch(name: str) -> Callable[..., None]:
            # A norm on each head leaves the heads apart.
            return lambda module, args, output: seen.update({name: output.flatten(2)})

        hooks = [attention.register_forward_hook(watch_attention, with_kwargs=True)]
        for name, path in zip(("query", "key", "value"), self._spec.family.projections, strict=True):
            hooks.append(attention.get_submodule(path).register_forward_hook(watch(name)))
        try:
            for batch in self._hidden[rows].split(self._batch_size):
                after = self._pass(layer, batch, self._rotary)
                residual = batch + seen["output"]
                batch.copy_(after)
                yield Attended(**seen, residual=residual)
        finally:
            for hook in hooks:
                hook.remove()


class ConvertedStream(ResidualStream):
    """The residual stream where the layers below are converted: source layers with other attention."""

    def __init__(
        self,
        spec: TargetSpec,
        hidden: Float[Tensor, "windows tokens hidden"],
        rotary: tuple[Tensor, Tensor],
        *,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        """Start from ``hidden``, with the source's cosines and sines."""
        super().__init__(spec, hidden, dtype=dtype, batch_size=batch_size)
        self._rotary = rotary

    @torch.no_grad()
    def advance(self, layer: nn.Module, attend: Callable[[Tensor], Tensor]) -> None:
        """Send all windows through ``layer`` with ``attend`` in the place of its attention."""
        name, source = self._spec.family.attention, layer.get_submodule(self._spec.family.attention)
        layer.set_submodule(name, _Attention(lambda inputs: attend(self._with_one(inputs))))
        try:
            for batch in self._hidden.split(self._batch_size):
                batch.copy_(self._pass(layer, batch, self._rotary))
        finally:
            layer.set_submodule(name, source)


def add_experts(streams: Sequence[ResidualStream], experts: Iterable[Expert]) -> None:
    """Add the experts of the layer that ``streams`` have just passed, as they come: one is in memory at a time.

    The streams are alike in device and type.
    """
    for expert in experts:
        add_expert(streams, expert)
        # Before the next one is read, not after.
        del expert
    for stream in streams:
        stream.forget_choices()


def add_expert(streams: Sequence[ResidualStream], expert: Expert) -> None:
    """Add one expert of the layer that ``streams``, alike in device and type, have just passed."""
    if streams:
        expert = streams[0].lend(expert)
    for stream in streams:
        stream.add_expert(expert)


def _products_in(dtype: torch.dtype, like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, dtype, enabled=dtype != torch.float32)


class _ExpertsLater(nn.Module):
    """Stands in the place of a layer's experts: sees who is chosen, and puts out nothing."""

    seen: tuple[Tensor, Tensor, Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.seen = hidden_states, top_k_index, top_k_weights
        return torch.zeros_like(hidden_states)


class _Attention(nn.Module):
    def __init__(self, attend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._attend = attend

    def forward(self, hidden_states: Tensor, *, position_embeddings: Any, **others: Any) -> tuple[Tensor, None]:
        # The converted attention turns by its own tables, and whole windows have neither mask nor cache.
        refuse_arguments(others, "attention")
        return self._attend(hidden_states), None
