"""Layer by layer: calibrate, convert, measure, write. One source layer and one converted one are in memory at a time.

Of a mixture of experts, that is a layer without its experts; they pass one by one after it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from transmla.arch.experts import ROUTER, Expert, ExpertNames, is_expert
from transmla.calibration.moments import AttentionWeights, Moments, MomentSums
from transmla.calibration.stream import Attended, add_expert
from transmla.convert.deepseek_tensors import from_deepseek, to_deepseek
from transmla.convert.fit.heal import heal_layer
from transmla.convert.fit.latent_norm import fitted_norm
from transmla.convert.fit.refit import refit_output
from transmla.convert.fit.routing import RouterInputs
from transmla.convert.fit.targets import LayerTargets, relative_error
from transmla.convert.latent_attention import LatentAttention
from transmla.convert.methods.queries import compress_queries, split_queries
from transmla.convert.plan import ConversionPlan
from transmla.convert.report import LayerReport
from transmla.convert.source_layers import as_stored, attention_weights, read_experts, read_layer, source_stream
from transmla.deepseek.names import ATTENTION, ZEROS, layer_prefix
from transmla.device import trim_memory

#: Is given tensors as they are stored, under their final names.
Write = Callable[[Mapping[str, Tensor]], None]


def convert_layers(
    plan: ConversionPlan,
    windows: Int[Tensor, "windows tokens"] | None,
    *,
    write: Write,
    start: int = 0,
    read_stored: Callable[[Sequence[str]], dict[str, Tensor]] | None = None,
) -> Iterator[LayerReport]:
    """Convert the layers from ``start`` on, in order, give their tensors to ``write``, and yield what was measured.

    With text, the layers before ``start`` are run once more without being converted, so that a resumed run sees the
    same activations as an undisturbed one; ``read_stored`` gives their tensors as an earlier run has written them.
    """
    walk = LayerConverter(plan, windows)
    for index in range(plan.spec.num_hidden_layers):
        trim_memory()
        if index >= start:
            yield walk.convert(index, write)
        elif windows is not None:
            assert read_stored is not None, "layers that are skipped have been written before"
            prefix = f"{layer_prefix(index)}{ATTENTION}."
            names = [tensor.name for tensor in plan.layer_tensors(index) if tensor.name.startswith(prefix)]
            walk.skip(index, {name.removeprefix(prefix): tensor for name, tensor in read_stored(names).items()})


class ImprovedAttention(NamedTuple):
    """A layer's attention after refit and healing, and what was measured on the way, where it was done.

    Attributes:
        attention: the better factors.
        error_before_refit: relative error on held-out windows; ``error_before_healing`` likewise.
        healing_gain: see :class:`~transmla.convert.fit.heal.HealedLayer`.
    """

    attention: LatentAttention
    error_before_refit: float | None = None
    error_before_healing: float | None = None
    healing_gain: float | None = None


def healing_steps(mean: int, index: int, num_layers: int) -> int:
    """Share the steps out: half as many again for the first layer as for the mean one, half as many for the last.

    What an early layer gets wrong, all later ones are given; on SmolLM2 layers 1 to 4 cost most of all.
    """
    return round(mean * (1.5 - index / (num_layers - 1))) if num_layers > 1 else mean


class LayerConverter:
    """The state that goes from layer to layer: the residual streams of the source and of the converted layers."""

    def __init__(self, plan: ConversionPlan, windows: Int[Tensor, "windows tokens"] | None) -> None:
        self._plan = plan
        self._fit, self._heldout = plan.counts.fit, plan.counts.heldout
        self._frequencies = plan.slot_frequencies
        self._stream = self._converted = None
        if windows is not None:
            self._stream = source_stream(plan, windows)
            self._converted = self._stream.fork() if plan.method.learns_on_converted else None

    def skip(self, index: int, stored: dict[str, Tensor]) -> None:
        """Send the residual streams through a layer that has been converted before."""
        assert self._stream is not None
        with self._stream.layer(index, read_layer(self._plan, index)) as layer:
            # In the batches of `_observe`: the last bits of a product depend on how many rows it has.
            for rows in (self._fit, self._heldout):
                for _ in self._stream.advance(layer, rows):
                    pass
            if self._converted is not None:
                self._advance_converted(layer, self._unfold(stored))
        self._pass_experts(index)

    def convert(self, index: int, write: Write) -> LayerReport:
        """Convert one layer and move the residual streams past it."""
        source = read_layer(self._plan, index)
        if self._stream is None:
            weights = attention_weights(self._plan, source)
            moments = (
                Moments.from_weights(weights, window=self._plan.request.window)
                if self._plan.method.needs_moments
                else None
            )
            attention, fold = self._convert_attention(weights, moments)
            write(self._finish(index, source, attention, moments))
            return LayerReport(layer=index, freq_fold=fold)
        with self._stream.layer(index, source) as layer:
            weights = attention_weights(self._plan, source, layer, source=self._stream, inputs=self._converted)
            routing = self._routing()
            moments, fit, heldout = self._observe(layer, weights, routing)
            attention, fold = self._convert_attention(weights, moments)
            improved = self._improve(index, attention.map(Tensor.float), moments, fit, heldout)
            routing_error = None
            if routing is not None and (mixture := self._plan.spec.mixture):
                router, routing_error = routing.sigmoid_router(
                    source[ROUTER], top_k=mixture.num_experts_per_tok, dtype=self._plan.dtype
                )
                source = source | {ROUTER: router}
            converted = self._finish(index, source, improved.attention, moments)
            write(converted)
            # What is stored is what the layers above will meet, rounding included.
            written = self._unfold(self._attention_tensors(converted))
            relative_error = self._error(written, heldout)
            if self._converted is not None and not self._is_last(index):
                self._advance_converted(layer, written)
        self._pass_experts(index, write)
        return LayerReport(
            layer=index,
            relative_error=relative_error,
            error_before_refit=improved.error_before_refit,
            error_before_healing=improved.error_before_healing,
            healing_gain=improved.healing_gain,
            routing_error=routing_error,
            freq_fold=fold,
        )

    def _pass_experts(self, index: int, write: Write | None = None) -> None:
        """Read a layer's experts one by one, write each, and move the residual streams past it."""
        found = () if self._is_last(index) else (self._stream, self._converted)
        streams = [stream for stream in found if stream is not None]
        for expert in read_experts(self._plan, index):
            if write is not None:
                write(self._stored_expert(index, expert))
            add_expert(streams, expert)
            # Before the next one is read, not after.
            del expert
        for stream in streams:
            stream.forget_choices()

    def _is_last(self, index: int) -> bool:
        """Return whether nothing reads what comes out of a layer."""
        return index + 1 == self._plan.spec.num_hidden_layers

    def _stored_expert(self, index: int, expert: Expert) -> dict[str, Tensor]:
        names, prefix = ExpertNames(), layer_prefix(index)
        matrices = {names.gate: expert.gate, names.up: expert.up, names.down: expert.down}
        return {
            prefix + name.format(expert.index): as_stored(self._plan, name, matrix) for name, matrix in matrices.items()
        }

    def _routing(self) -> RouterInputs | None:
        plan = self._plan
        return RouterInputs(plan.spec.hidden_size, plan.device) if plan.spec.mixture else None

    def _observe(
        self, layer: nn.Module, weights: AttentionWeights, routing: RouterInputs | None
    ) -> tuple[Moments | None, LayerTargets | None, LayerTargets]:
        """Return the moments on the fitted windows, and what there is to learn on them and on the held-out ones.

        Without a converted stream nothing is learnt, and nothing but the moments is kept of the fitted windows.
        """
        assert self._stream is not None
        spec, tokens = self._plan.spec, self._plan.request.window
        sums = MomentSums(weights, spec, tokens=tokens) if self._plan.method.needs_moments else None
        fit = None
        if self._converted is None:
            for attended in self._advance(layer, self._fit, routing):
                if sums is not None:
                    sums.add(attended)
        else:
            fit = self._lesson(layer, self._fit, routing, sums)
        moments = None if sums is None else sums.finish()
        return moments, fit, self._lesson(layer, self._heldout, routing)

    def _advance(self, layer: nn.Module, rows: slice, routing: RouterInputs | None) -> Iterator[Attended]:
        """Move the source's stream past ``layer``, and see what its router is given."""
        assert self._stream is not None
        norm = layer.get_submodule(self._plan.spec.family.mlp_norm)
        for attended in self._stream.advance(layer, rows):
            if routing is not None:
                routing.add(norm(attended.residual), heldout=rows == self._heldout)
            yield attended

    def _lesson(
        self, layer: nn.Module, rows: slice, routing: RouterInputs | None, sums: MomentSums | None = None
    ) -> LayerTargets:
        """Move the source's stream past ``layer``, and say what the converted layer should make of its own inputs."""
        assert self._stream is not None
        inputs = (self._converted or self._stream).inputs(layer, rows)
        shape = inputs.shape[:2]
        targets = LayerTargets(inputs, inputs.new_empty(*shape, self._plan.spec.hidden_size), inputs.new_empty(shape))
        done = 0
        for attended in self._advance(layer, rows, routing):
            batch = slice(done, done + len(attended.input))
            done = batch.stop
            wanted = attended.output
            if self._converted is not None:
                wanted = attended.residual - self._converted.hidden(rows)[batch]
            targets.outputs[batch] = wanted
            targets.weights[batch] = _importance(attended.residual)
            if sums is not None:
                sums.add(attended, inputs[batch])
        return targets

    def _improve(
        self,
        index: int,
        attention: LatentAttention,
        moments: Moments | None,
        fit: LayerTargets | None,
        heldout: LayerTargets,
    ) -> ImprovedAttention:
        """Refit and heal, and measure the error on held-out windows before each."""
        request = self._plan.request
        if fit is None or moments is None:
            return ImprovedAttention(attention)
        if self._plan.fits_latent_norm:
            attention = fitted_norm(attention, fit, moments.uniform, batch_size=request.batch_size)
        error_before_refit = self._error(attention, heldout)
        error_before_healing = healing_gain = None
        if self._plan.method.refits:
            attention = refit_output(attention, fit, self._frequencies, batch_size=request.batch_size)
        if request.heal_steps:
            error_before_healing = self._error(attention, heldout)
            attention, healing_gain = heal_layer(
                attention,
                fit,
                self._frequencies,
                steps=healing_steps(request.heal_steps, index, self._plan.spec.num_hidden_layers),
                batch_size=request.batch_size,
                seed=request.seed + index,
                dtype=getattr(torch, request.compute_dtype),
            )
        return ImprovedAttention(attention, error_before_refit, error_before_healing, healing_gain)

    def _finish(
        self,
        index: int,
        source: dict[str, Tensor],
        attention: LatentAttention,
        moments: Moments | None,
    ) -> dict[str, Tensor]:
        """Return the factors in the target's format, beside what is no part of attention, nor of an expert."""
        plan = self._plan
        folded = to_deepseek(
            attention,
            plan.sizes,
            plan.norm,
            input_moment=None if moments is None else moments.uniform,
            input_bound=self._input_bound(source[plan.spec.family.input_norm]),
            residual=plan.residual,
        )
        attention_tensors = {f"{ATTENTION}.{name}": tensor.to(plan.dtype) for name, tensor in folded.items()}
        tensors = {}
        for planned in plan.layer_tensors(index):
            local = planned.name.removeprefix(layer_prefix(index))
            if local in attention_tensors:
                tensors[planned.name] = attention_tensors[local]
            elif local.startswith(ZEROS):
                tensors[planned.name] = torch.zeros(planned.shape, dtype=plan.dtype)
            elif not is_expert(local):
                tensors[planned.name] = as_stored(plan, local, source[local])
        return tensors

    def _input_bound(self, norm: Tensor) -> float:
        """Return the largest possible length of the input of attention."""
        spec = self._plan.spec
        # RMSNorm gives a vector of length sqrt(hidden_size) before its weight; a one follows where there are biases.
        return math.hypot(norm.abs().max().item() * math.sqrt(spec.hidden_size), spec.input_size - spec.hidden_size)

    def _unfold(self, stored: dict[str, Tensor]) -> LatentAttention:
        tensors = {name: tensor.to(self._plan.device, torch.float32) for name, tensor in stored.items()}
        plan = self._plan
        return from_deepseek(tensors, plan.sizes, plan.norm, residual=plan.residual, own_norm=plan.fits_latent_norm)

    @staticmethod
    def _attention_tensors(converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        part = f".{ATTENTION}."
        return {name.partition(part)[2]: tensor for name, tensor in converted.items() if part in name}

    def _error(self, attention: LatentAttention, heldout: LayerTargets) -> float:
        return relative_error(attention, heldout, self._frequencies, batch_size=self._plan.request.batch_size)

    def _advance_converted(self, layer: nn.Module, attention: LatentAttention) -> None:
        assert self._converted is not None

        def attend(inputs: Tensor) -> Tensor:
            return attention.attend(inputs.float(), self._frequencies).to(inputs.dtype)

        self._converted.advance(layer, attend)

    def _convert_attention(
        self, weights: AttentionWeights, moments: Moments | None
    ) -> tuple[LatentAttention, int | None]:
        """Return the plain factors, and the fold at which the rotation was split."""
        plan = self._plan
        converted = plan.method.convert(weights, moments, plan.layer_goal(plan.sizes, plan.folds))
        attention = converted.attention
        if moments is not None and plan.request.q_lora_rank is not None:
            attention = compress_queries(attention, moments, rank=plan.request.q_lora_rank)
        elif plan.sizes.q_lora_rank is not None:
            attention = split_queries(attention, head_dim=plan.spec.head_dim)
        return attention, converted.freq_fold


def _importance(residual: Tensor) -> Tensor:
    square = residual.float().square().mean(-1)
    # A token without a residual stream is no reason to forget all others.
    return 1 / (square + 1e-6 * square.mean() + torch.finfo(torch.float32).tiny)
