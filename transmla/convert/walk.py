"""Layer by layer: calibrate, convert, measure. One source layer and one converted layer are in memory at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from transmla.arch.skeleton import Skeleton
from transmla.calibration.moments import AttentionWeights, Moments, MomentSums
from transmla.calibration.stream import Attended, SourceStream
from transmla.convert.fold import fold_layer
from transmla.convert.latent import LatentAttention
from transmla.convert.layer import Target, complex_layer, compress_queries, exact_layer, rorope_layer
from transmla.convert.plan import ConversionPlan
from transmla.convert.report import LayerReport
from transmla.convert.target import load_target, target_frequencies
from transmla.device import trim_memory

_METHODS = {"complex": complex_layer, "rorope": rorope_layer}


@dataclass(frozen=True, eq=False)
class ConvertedLayer:
    """A layer's tensors as they are stored, under their final names, and what was measured."""

    tensors: dict[str, Tensor]
    report: LayerReport


def walk_layers(
    plan: ConversionPlan, windows: Int[Tensor, "windows tokens"] | None, *, start: int = 0
) -> Iterator[ConvertedLayer]:
    """Convert the layers from ``start`` on, in order.

    With text, the layers before ``start`` are run once more without being converted, so that a resumed run sees the
    same activations as an undisturbed one.
    """
    walk = _Walk(plan, windows)
    for index in range(plan.spec.num_hidden_layers):
        trim_memory()
        if index >= start:
            yield walk.convert(index)
        elif windows is not None:
            walk.skip(index)


class _Walk:
    """The state that goes from layer to layer: the residual stream of the source."""

    def __init__(self, plan: ConversionPlan, windows: Int[Tensor, "windows tokens"] | None) -> None:
        self._plan = plan
        self._fit = slice(0, plan.request.num_windows)
        self._heldout = slice(plan.request.num_windows, None)
        self._tokens = plan.request.window
        self._target = Skeleton(load_target(plan.config))
        self._stream = None
        if windows is not None:
            embedding = plan.spec.family.embedding
            self._stream = SourceStream(
                plan.skeleton,
                plan.spec,
                plan.reader.read([embedding])[embedding],
                windows,
                device=plan.device,
                dtype=getattr(torch, plan.request.compute_dtype),
                batch_size=plan.request.batch_size,
            )

    def skip(self, index: int) -> None:
        """Send the residual stream through a layer that has been converted before."""
        assert self._stream is not None
        with self._stream.layer(index, self._read(index)) as layer:
            # In the batches of `_observe`: the last bits of a product depend on how many rows it has.
            for rows in (self._fit, self._heldout):
                for _ in self._stream.advance(layer, rows):
                    pass

    def convert(self, index: int) -> ConvertedLayer:
        """Convert one layer and move the residual stream past it."""
        plan, source = self._plan, self._read(index)
        weights = self._attention_weights(source)
        moments, heldout = self._observe(index, source, weights)
        attention, fold = self._convert_attention(weights, moments)
        gain = source[plan.spec.family.input_norm].abs().max().item()
        folded = fold_layer(
            attention,
            plan.sizes,
            plan.norm,
            input_moment=moments.uniform,
            # RMSNorm gives a vector of length sqrt(hidden_size) before its weight.
            input_bound=gain * math.sqrt(plan.spec.hidden_size),
            residual=plan.residual,
        )
        stored = {f"{plan.spec.family.attention}.{name}": tensor.to(plan.dtype) for name, tensor in folded.items()}
        error = self._relative_error(index, stored, heldout) if heldout else None
        return ConvertedLayer(
            tensors=self._complete(index, stored, source),
            report=LayerReport(layer=index, relative_error=error, freq_fold=fold),
        )

    def _observe(
        self, index: int, source: dict[str, Tensor], weights: AttentionWeights
    ) -> tuple[Moments, list[Attended]]:
        """Return the moments on the fitted windows, and what the source's attention did on the held-out ones."""
        if self._stream is None:
            return Moments.from_weights(weights, window=self._tokens), []
        sums = MomentSums(weights.output_gram, self._plan.spec, tokens=self._tokens)
        with self._stream.layer(index, source) as layer:
            for attended in self._stream.advance(layer, self._fit):
                sums.add(attended)
            heldout = list(self._stream.advance(layer, self._heldout))
        return sums.finish(), heldout

    def _relative_error(self, index: int, stored: dict[str, Tensor], heldout: list[Attended]) -> float:
        """Run the stock DeepSeek-V3 attention with the tensors as stored, on the source's inputs."""
        prefix = f"{self._plan.spec.family.attention}."
        tensors = {name.removeprefix(prefix): tensor.float() for name, tensor in stored.items()}
        device = self._plan.device
        positions = torch.arange(self._tokens, device=device).unsqueeze(0)
        rotary = self._target.rotary(device)(torch.empty(1, device=device), positions)
        wrong = total = 0.0
        with self._target.module(f"model.layers.{index}.self_attn", tensors) as attention, torch.no_grad():
            for batch in heldout:
                output, _ = attention(batch.input.float(), position_embeddings=rotary, attention_mask=None)
                expected = batch.output.float() * self._plan.residual
                wrong += (output - expected).square().sum().item()
                total += expected.square().sum().item()
        return math.sqrt(wrong / total) if total else 0.0

    def _complete(self, index: int, attention: dict[str, Tensor], source: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the tensors that are no part of attention, under the target's names."""
        writers = self._plan.spec.family.residual_writers
        tensors = {}
        for planned in self._plan.layer_tensors(index):
            local = planned.name.removeprefix(f"model.layers.{index}.")
            if local in attention:
                tensors[planned.name] = attention[local]
            else:
                tensors[planned.name] = self._plan.stored(source[local], residual=local in writers)
        return tensors

    def _read(self, index: int) -> dict[str, Tensor]:
        """Read a source layer in its storage type, named relative to the layer."""
        prefix = self._plan.spec.layer_prefix(index)
        names = [name for name in self._plan.skeleton.shapes if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self._plan.reader.read(names).items()}

    def _attention_weights(self, source: dict[str, Tensor]) -> AttentionWeights:
        projections = {
            name: source[f"{self._plan.spec.family.attention}.{name}.weight"].to(self._plan.device, torch.float32)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        return AttentionWeights.from_projections(self._plan.spec, **projections)

    def _convert_attention(self, weights: AttentionWeights, moments: Moments) -> tuple[LatentAttention, int | None]:
        """Return the plain factors, and the fold at which the rotation was split."""
        plan = self._plan
        if plan.method == "exact":
            return exact_layer(weights), None
        target = Target(
            kv_lora_rank=plan.sizes.kv_lora_rank,
            slot_frequencies=target_frequencies(plan.spec, plan.sizes).to(plan.device),
            pair_frequencies=plan.spec.frequencies.double().to(plan.device),
            folds=plan.folds,
        )
        attention, fold = _METHODS[plan.method](weights, moments, target)
        if plan.sizes.q_lora_rank is not None:
            attention = compress_queries(attention, moments, rank=plan.sizes.q_lora_rank)
        return attention, fold
