"""Where the loss comes from: one converted layer at a time in the source.

The source reads some windows once for each layer, with this layer's attention replaced by the converted one. What its
output is off by, and what the loss rises by, say where more rank would pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from transmla.config import EvalRequest
from transmla.errors import UsageError
from transmla.evaluate.lazy_model import LazyModel
from transmla.evaluate.parts.base import Part, Setting
from transmla.evaluate.report.svg import as_svg, new_figure
from transmla.evaluate.report.text_table import Shown, TextTable, small
from transmla.evaluate.result_cache import Arrays, ResultCache
from transmla.evaluate.token_scores import score_tokens
from transmla.evaluate.windows import ScoredWindows
from transmla.modeling.absorption import has_latent_attention, set_form
from transmla.progress import Progress
from transmla.records import Record


class LayerScore(Record):
    """One converted layer in the source: relative error of its attention's output, and what the loss rises by.

    ``share`` is its part of the sum over all layers; the layers together may cost more, or less, than that.
    """

    layer: int
    relative_error: float
    excess_nll: float
    share: float


class ModelLayers(Record):
    """All layers of one converted model."""

    model: str
    layers: tuple[LayerScore, ...]


class LayersReport(Record):
    """The layers of all converted models, one at a time in the source, whose own entry is ``None``."""

    dataset: str
    num_positions: int
    scores: tuple[ModelLayers | None, ...]


class LayerwisePart(Part):
    """The layers of all converted models."""

    name = "layers"
    record = LayersReport
    flags = ("--per-layer",)
    on_first_text = True

    @classmethod
    def wanted(cls, request: EvalRequest) -> bool:
        """Return whether it is asked for."""
        return request.per_layer

    @classmethod
    def build(cls, setting: Setting) -> Iterator[Part]:
        """Yield one part, on the first text."""
        request, (dataset, windows) = setting.request, setting.first_text
        windows = windows.head(request.layer_windows)
        yield cls(dataset, windows, results=setting.cache, source=setting.source, batch_size=request.batch_size)

    @classmethod
    def tables(cls, records: Sequence[LayersReport], shown: Shown) -> Iterator[TextTable]:
        """Yield what each layer is off by, and what the loss rises by."""
        for record in records:
            models = [model for model in record.scores if model is not None]
            rows = []
            for layers in zip(*(model.layers for model in models), strict=True):
                cells = (f"{layer.relative_error:.1%}  {layer.excess_nll:+.4f}" for layer in layers)
                rows.append((str(layers[0].layer), *cells))
            sums = (sum(layer.excess_nll for layer in model.layers) for model in models)
            rows.append(("sum", *(small(total, "+") for total in sums)))
            yield TextTable("One layer at a time: off by, loss rises by", ("Layer", *shown.names[1:]), tuple(rows))

    @classmethod
    def plots(cls, records: Sequence[LayersReport], shown: Shown) -> Iterator[tuple[str, str]]:
        """Yield both, layer by layer."""
        for record in records:
            yield "One converted layer at a time", _plot(record, shown.names)

    def __init__(
        self, dataset: str, windows: ScoredWindows, *, results: ResultCache, source: LazyModel, batch_size: int
    ) -> None:
        """Take a few windows of a text.

        Args:
            dataset: what the user calls it.
            windows: the windows.
            results: where what is known lies.
            source: whose layers are replaced.
            batch_size: windows at once.
        """
        self._dataset, self._windows = dataset, windows
        self._results, self._source, self._batch_size = results, source, batch_size
        self._found: list[tuple[str, Arrays]] = []

    def measure(self, lazy: LazyModel, progress: Progress) -> None:
        """Put a model's layers into the source, one after the other."""
        if lazy is self._source:
            return
        key = {"what": "layers", **lazy.key, "source": self._source.fingerprint, **self._windows.settings}

        def read() -> Arrays:
            return measure_layers(
                self._source.model, lazy.model, self._windows, batch_size=self._batch_size, progress=progress
            )

        self._found.append((lazy.name, self._results.arrays(key, read)))

    def report(self) -> Iterator[LayersReport]:
        """Put everything together."""
        yield LayersReport(
            dataset=self._dataset,
            num_positions=self._windows.num_positions,
            scores=(None, *(_layers_of(name, found) for name, found in self._found)),
        )


def _layers_of(name: str, found: Arrays) -> ModelLayers:
    increase = found["nll"] - found["source_nll"]
    total = float(increase.sum())
    return ModelLayers(
        model=name,
        layers=tuple(
            LayerScore(
                layer=layer,
                relative_error=float(error),
                excess_nll=float(more),
                share=float(more) / total if total else 0.0,
            )
            for layer, (error, more) in enumerate(zip(found["error"], increase, strict=True))
        ),
    )


def measure_layers(
    source: PreTrainedModel, converted: PreTrainedModel, windows: ScoredWindows, *, batch_size: int, progress: Progress
) -> Arrays:
    """Replace the source's attention by the converted one, layer after layer.

    Returns:
        ``error``, for each layer: what its attention's output is off by, the root of the share of squares, where the
        input is the source's own. ``nll`` and ``source_nll``: the loss with this layer replaced, and without.

    Raises:
        UsageError: the layers of the two do not answer to each other.
    """
    pairs = list(zip(source.get_decoder().layers, converted.get_decoder().layers, strict=False))
    if source.config.num_hidden_layers != converted.config.num_hidden_layers or not has_latent_attention(converted):
        raise UsageError(f"--per-layer compares a source with its conversions, which {converted.name_or_path} is not.")
    rotary = converted.get_decoder().rotary_emb
    # Norms cannot tell a residual stream of another scale, if their eps is scaled as well.
    scale = (converted.config.rms_norm_eps / source.config.rms_norm_eps) ** 0.5
    set_form(converted, "expanded")
    try:
        errors, losses = [], []
        with progress.task(f"Layers of {converted.name_or_path}", len(pairs) + 1) as advance:
            source_nll = _mean_nll(source, windows, batch_size)
            advance(1)
            for layer, substitute in pairs:
                with _replaced(layer, _Substitute(substitute, rotary, scale)) as error:
                    losses.append(_mean_nll(source, windows, batch_size))
                errors.append(error.relative)
                advance(1)
    finally:
        set_form(converted, "absorbed")
    return {"error": numpy.array(errors), "nll": numpy.array(losses), "source_nll": numpy.array(source_nll)}


def _mean_nll(model: PreTrainedModel, windows: ScoredWindows, batch_size: int) -> float:
    return float(score_tokens(model, windows, batch_size=batch_size)["nll"].mean(dtype=numpy.float64))


@dataclass(frozen=True)
class _Substitute:
    """A converted layer's attention, on the input of the source's layer."""

    layer: nn.Module
    rotary: nn.Module
    scale: float

    def __call__(self, stream: Float[Tensor, "batch window hidden"]) -> Float[Tensor, "batch window hidden"]:
        scaled = stream * self.scale
        positions = torch.arange(stream.shape[1], device=stream.device)[None]
        layer: Any = self.layer
        output, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(scaled),
            position_embeddings=self.rotary(scaled, positions),
            attention_mask=None,
        )
        return output / self.scale


@dataclass
class _Error:
    off: float = 0.0
    whole: float = 0.0

    @property
    def relative(self) -> float:
        return (self.off / self.whole) ** 0.5 if self.whole else 0.0


@contextmanager
def _replaced(layer: Any, substitute: Callable[[Tensor], Tensor]) -> Iterator[_Error]:
    """Let a layer's attention put out what another puts out; compare the two meanwhile."""
    error, streams = _Error(), []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(args[0] if args else kwargs["hidden_states"])

    def replace(_: Any, __: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        other = substitute(streams.pop())
        error.off += float((other.float() - output[0].float()).square().sum())
        error.whole += float(output[0].float().square().sum())
        return (other, *output[1:])

    hooks = [
        layer.register_forward_pre_hook(keep, with_kwargs=True),
        layer.self_attn.register_forward_hook(replace),
    ]
    try:
        yield error
    finally:
        for hook in hooks:
            hook.remove()


def _plot(record: LayersReport, names: Sequence[str]) -> str:
    figure = new_figure(9.0, 3.0)
    for axes, field, label in zip(
        figure.subplots(1, 2), ("relative_error", "excess_nll"), ("output off by", "loss rises by, nats"), strict=True
    ):
        for number, (name, model) in enumerate(zip(names[1:], record.scores[1:], strict=True), start=1):
            if model is None:
                continue
            axes.plot([getattr(layer, field) for layer in model.layers], marker=".", color=f"C{number}", label=name)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return as_svg(figure)
