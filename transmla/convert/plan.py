"""The plan: everything that can fail without data fails here, on headers and meta tensors."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transmla.arch.experts import ExpertNames, unpacked_shapes
from transmla.arch.skeleton import Skeleton
from transmla.arch.weight_names import left_over
from transmla.calibration.windows import WindowCounts
from transmla.checkpoint.publish import check_free_space, check_output, reserved_bytes
from transmla.checkpoint.reader import CheckpointReader
from transmla.checkpoint.shards import ShardPlan, TensorPlan, plan_shards
from transmla.checkpoint.source import Source
from transmla.checkpoint.stamps import file_stamp
from transmla.config import ConvertRequest
from transmla.convert.memory_estimate import LIBRARIES, Footprint
from transmla.convert.methods import find_method
from transmla.convert.methods.base import LayerGoal, Method
from transmla.convert.opened import OpenedSource, fetch_weights, open_model
from transmla.convert.settle import settle
from transmla.convert.summary import PlanSummary, Prediction
from transmla.convert.validate import Choices
from transmla.data.documents import Reading
from transmla.deepseek.config import load_target, target_config, target_frequencies
from transmla.deepseek.engines import ENGINES, dictating, engines_for
from transmla.deepseek.names import LAYERS, layer_prefix
from transmla.deepseek.neutral_norm import NORMS, NeutralNorm, residual_scale
from transmla.deepseek.sizes import MLASizes
from transmla.deepseek.target_spec import TargetSpec
from transmla.device import choose_device
from transmla.errors import CheckpointError, OutputError, UsageError
from transmla.versions import loaded_versions

# A share of the cache that differs by less is what was asked for.
_AS_ASKED = 0.01
#: Windows of the text to fit on by default; and how often healing may see each of those that it asks for.
FEWEST_WINDOWS = 128
_PASSES = 3


@dataclass(frozen=True, eq=False)
class ConversionPlan:
    """A conversion that is known to be possible.

    Attributes:
        opened: the source.
        spec: of its attention, with what the target keeps.
        method: with its options.
        folds: how many neighboring frequencies may share slots; the best is chosen per layer.
        residual: factor on everything that is added to the residual stream.
        config: the target's config.json.
        readings: what became of the rows of the calibration data.
        predictions: of the splits that were compared, where there was text to compare them on.
        num_windows: natural ones to fit on, once the text has been read.
    """

    request: ConvertRequest
    opened: OpenedSource
    spec: TargetSpec
    reader: CheckpointReader
    device: torch.device
    method: Method
    sizes: MLASizes
    folds: tuple[int, ...]
    norm: NeutralNorm
    residual: float
    dtype: torch.dtype
    config: dict[str, Any]
    shards: tuple[ShardPlan, ...]
    predictions: tuple[Prediction, ...] = ()
    readings: tuple[Reading, ...] = ()
    num_windows: int | None = None

    @property
    def source(self) -> Source:
        """Where the source is."""
        return self.opened.source

    @property
    def skeleton(self) -> Skeleton:
        """The source without weights."""
        return self.opened.skeleton

    @property
    def source_shapes(self) -> Mapping[str, torch.Size]:
        """What the source's checkpoint holds."""
        return self.opened.shapes

    def at(self, request: ConvertRequest) -> "ConversionPlan":
        """Return the plan of another request for the same source, which stays open.

        Raises:
            TransMLAError: it cannot be carried out.
        """
        plan = _planned(request, self.opened, self.reader, self.device, _settled(request, self.opened))
        return replace(plan, num_windows=self.num_windows, readings=self.readings)

    @property
    def needs_text(self) -> bool:
        """Whether the layers are fitted to calibration text."""
        return bool(self.request.calibration) and self.request.calibration != ("none",)

    @property
    def counts(self) -> WindowCounts:
        """How many windows are read of each kind."""
        return self.counts_with(self.num_windows or self.request.num_windows or self.wanted_windows)

    def counts_with(self, natural: int) -> WindowCounts:
        """Return the same where the text has so many windows to fit on."""
        return WindowCounts.of(natural, self.request.num_heldout_windows, repeats=self.repeats)

    @property
    def repeats(self) -> float:
        """Windows of repeats as a share of the natural ones."""
        return self.method.repeats if self.request.repeats is None else self.request.repeats

    @property
    def wanted_windows(self) -> int:
        """Windows of the text to fit on without ``--num-windows``: healing reads them a few times over."""
        needed = math.ceil(self.request.heal_steps * self.request.batch_size / _PASSES)
        return max(FEWEST_WINDOWS, needed)

    @property
    def left_over(self) -> tuple[str, ...]:
        """Names of tensors that are no part of the model that is converted."""
        return left_over(self.reader.headers, self.source_shapes, self.spec.family)

    @property
    def fits_latent_norm(self) -> bool:
        """Whether the latent norm is a real one."""
        return self.request.latent_norm == "fitted"

    @property
    def slot_frequencies(self) -> Float[Tensor, " slot"]:
        """Frequencies of the target's rotary slots."""
        if self.method.own_frequencies:
            return self.spec.frequencies.repeat(self.spec.num_key_value_heads).to(self.device)
        return target_frequencies(self.spec, self.sizes).to(self.device)

    def layer_goal(self, sizes: MLASizes, folds: tuple[int, ...]) -> LayerGoal:
        """Return what one layer is converted to, at ``sizes``."""
        return LayerGoal(
            # One number is for the length of the latent.
            kv_lora_rank=sizes.kv_lora_rank - self.fits_latent_norm,
            slot_frequencies=target_frequencies(self.spec, sizes).to(self.device),
            pair_frequencies=self.spec.frequencies.double().to(self.device),
            folds=folds,
            context=self.spec.max_position_embeddings,
        )

    def layer_tensors(self, index: int) -> list[TensorPlan]:
        """Return the target's tensors of decoder layer ``index``."""
        prefix = layer_prefix(index)
        return [tensor for shard in self.shards for tensor in shard.tensors if tensor.name.startswith(prefix)]

    def outer_tensors(self) -> list[TensorPlan]:
        """Return the target's tensors outside the decoder layers."""
        return [t for shard in self.shards for t in shard.tensors if not t.name.startswith(LAYERS)]

    def identity(self, windows: Tensor | None) -> dict[str, Any]:
        """Return all that decides the output's bytes, by names that people know: only the same work is resumed."""
        request = self.request.model_dump(mode="json", exclude={"output_dir", "token"})
        headers = {name: (h.file, list(h.shape), str(h.dtype)) for name, h in sorted(self.reader.headers.items())}
        files = sorted({"config.json", *(header.file for header in self.reader.headers.values())})
        stamps = {name: file_stamp(self.source.folder / name) for name in files}
        return {
            **loaded_versions().model_dump(),
            "kind of device": self.device.type,
            **{ConvertRequest.spell(field): value for field, value in request.items()},
            "files of the source": _digest(json.dumps([headers, stamps]).encode()),
            "config of the result": _digest(json.dumps(self.config).encode()),
            "calibration windows": None if windows is None else _digest(windows.numpy().tobytes()),
        }

    def is_unchanged(self, identity: dict[str, Any], windows: Tensor | None) -> bool:
        """Return whether the files of the source are still those of an earlier ``identity``."""
        try:
            return self.identity(windows) == identity
        except CheckpointError:
            return False

    @property
    def summary(self) -> PlanSummary:
        """Put the plan in figures."""
        spec, sizes = self.spec, self.sizes
        stored = self.reader.headers[spec.family.embedding].dtype
        return PlanSummary(
            model=self.source.name,
            family=spec.family.title,
            output_dir=str(self.request.output_dir),
            method=self.method.name,
            kv_lora_rank=sizes.kv_lora_rank,
            qk_rope_head_dim=sizes.qk_rope_head_dim,
            qk_nope_head_dim=sizes.qk_nope_head_dim,
            v_head_dim=sizes.v_head_dim,
            q_lora_rank=sizes.q_lora_rank,
            dtype=str(self.dtype).removeprefix("torch."),
            source_dtype=str(stored).removeprefix("torch."),
            source_numbers_per_token_layer=spec.cache_numbers,
            numbers_per_token_layer=sizes.cache_numbers,
            share=sizes.cache_numbers / spec.cache_numbers,
            source_kv_bytes_per_token=spec.cache_numbers * stored.itemsize * spec.num_hidden_layers,
            kv_bytes_per_token=sizes.cache_numbers * self.dtype.itemsize * spec.num_hidden_layers,
            num_layers=spec.num_hidden_layers,
            num_shards=len(self.shards),
            output_bytes=sum(shard.nbytes for shard in self.shards),
            peak_memory_bytes=self.footprint.peak,
            library_memory_bytes=LIBRARIES,
            engines=tuple(engines_for(sizes, spec, self.request)),
            predictions=self.predictions,
            left_over=self.left_over,
            warnings=tuple(self.warnings()),
            unread=tuple(sorted(spec.unread)),
        )

    @property
    def footprint(self) -> Footprint:
        """What decides how much memory the conversion takes."""
        return Footprint(
            request=self.request,
            spec=self.spec,
            sizes=self.sizes,
            layer={tensor.name: tensor.shape for tensor in self.layer_tensors(0)},
            method=self.method,
            counts=self.counts,
            stored=self.reader.headers[self.spec.family.embedding].dtype,
            dtype=self.dtype,
            with_text=self.needs_text,
            # Of several splits that have been compared, one has been taken since.
            scales=self.residual != 1,
            predicts=self.request.kv_ratio is not None or len(self.predictions) > 1,
        )

    def check_space(self) -> None:
        """Make sure that the output fits on its disk, what an interrupted run has left there counted.

        Raises:
            OutputError: it does not.
        """
        needed = sum(shard.nbytes for shard in self.shards) - reserved_bytes(self.request.output_dir)
        check_free_space(self.request.output_dir.parent, needed)

    def warnings(self) -> Iterator[str]:
        """Yield what whoever starts the conversion should know."""
        if self.spec.mixture and len(self.request.calibration) == 1:
            yield (
                "The routing is fitted on one text, and on text of other kinds tokens may be sent to other experts "
                "than in the source: repeat --calibration with text of every kind that matters, such as prose, code, "
                "chat."
            )
        share, ratio = self.sizes.cache_numbers / self.spec.cache_numbers, self.request.kv_ratio
        if ratio is not None and abs(share - ratio) > _AS_ASKED:
            for name in dictating(self.request.engine):
                sizes = " or ".join(f"{rank} + {rope}" for rank, rope in ENGINES[name].caches)
                yield (
                    f"The cache will be {share:.1%} of the source's, not the {ratio:.1%} of --kv-ratio: "
                    f"{ENGINES[name].title} dictates its size, {sizes}."
                )
        if unused := self.left_over:
            yield (
                f"{len(unused)} tensors are left out, {unused[0]} among them: transformers does not read them for this "
                "family either."
            )
        headers = [self.reader.headers[name] for name in self.source_shapes]
        wider = [header for header in headers if header.dtype.itemsize > self.dtype.itemsize]
        if wider and self.request.dtype == "auto" and self.dtype != torch.float32:
            stored = str(wider[0].dtype).removeprefix("torch.")
            yield (
                f"{len(wider)} tensors are stored in {stored}, {wider[0].name} among them, and will be rounded to the "
                "type of the embedding: --dtype float32 keeps them."
            )
        try:
            self.check_space()
        except OutputError as error:
            yield str(error)


def plan_conversion(request: ConvertRequest, *, overwrite: bool = False, writes: bool = True) -> ConversionPlan:
    """Open the source and settle everything but the numbers.

    Args:
        request: what is wanted.
        overwrite: an output folder may exist.
        writes: there will be an output; otherwise its folder may be anything.

    Raises:
        TransMLAError: the request cannot be carried out; which part, and what would do.
    """
    find_method(request)  # Before anything is opened.
    opened = open_model(request)
    if writes:
        check_output(request.output_dir, source_folder=opened.source.folder, overwrite=overwrite)
    device = choose_device(request.device)
    if device.type == "mps":
        raise UsageError("The mps device has no float64, which the moments need: pass --device cpu.")
    choices = _settled(request, opened)
    opened, reader = fetch_weights(opened, token=request.token)
    return _planned(request, opened, reader, device, choices)


def _settled(request: ConvertRequest, opened: OpenedSource) -> Choices:
    return settle(request, opened.spec, stored=opened.headers[opened.spec.family.embedding].dtype)


def _planned(
    request: ConvertRequest, opened: OpenedSource, reader: CheckpointReader, device: torch.device, choices: Choices
) -> ConversionPlan:
    """Plan a conversion of what is open."""
    spec, sizes, dtype, norm = choices.spec, choices.sizes, choices.dtype, NORMS[request.profile]
    config = target_config(opened.config, spec, sizes, norm, dtype=dtype, exact=request.exact)
    # The stock class itself says which tensors a checkpoint of this config has.
    shapes = unpacked_shapes(Skeleton(load_target(config)).shapes, ExpertNames())
    tensors = [TensorPlan(name, tuple(shape), dtype) for name, shape in shapes.items()]
    return ConversionPlan(
        request=request,
        opened=opened,
        spec=spec,
        reader=reader,
        device=device,
        method=choices.method,
        sizes=sizes,
        folds=choices.folds,
        norm=norm,
        residual=residual_scale(spec.rms_norm_eps, norm),
        dtype=dtype,
        config=config,
        shards=plan_shards(tensors, max_shard_size=request.max_shard_size),
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
