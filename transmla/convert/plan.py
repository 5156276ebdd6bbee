"""The plan: everything that can fail without data fails here, on headers and meta tensors."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from transmla.arch.experts import DOWN, GATE_UP, Expert, ExpertNames, is_expert, unpacked_shapes
from transmla.arch.skeleton import Skeleton
from transmla.arch.spec import AttentionSpec
from transmla.arch.weight_names import as_class_names, left_over
from transmla.calibration.linearize import PROJECTIONS, nearest_linear, token_costs
from transmla.calibration.moments import AttentionWeights
from transmla.calibration.stream import ResidualStream, SourceStream
from transmla.checkpoint.publish import check_free_space, check_output, reserved_bytes
from transmla.checkpoint.reader import CheckpointReader
from transmla.checkpoint.shards import ShardPlan, TensorPlan, plan_shards
from transmla.checkpoint.source import Source
from transmla.checkpoint.stamps import file_stamp
from transmla.config import ConvertRequest
from transmla.convert.memory_estimate import LIBRARIES, Footprint
from transmla.convert.methods import find_method
from transmla.convert.methods.base import LayerGoal, Method
from transmla.convert.opened import fetch_weights, open_model
from transmla.convert.settle import settle
from transmla.convert.summary import PlanSummary, Prediction
from transmla.data.documents import Reading
from transmla.deepseek.config import load_target, target_config, target_frequencies
from transmla.deepseek.engines import ENGINES, dictating, engines_for
from transmla.deepseek.names import LAYERS, layer_prefix
from transmla.deepseek.neutral_norm import NORMS, NeutralNorm, residual_scale
from transmla.deepseek.sizes import MLASizes
from transmla.device import choose_device
from transmla.errors import CheckpointError, OutputError, UsageError
from transmla.versions import loaded_versions

# A share of the cache that differs by less is what was asked for.
_AS_ASKED = 0.01


@dataclass(frozen=True, eq=False)
class ConversionPlan:
    """A conversion that is known to be possible.

    Attributes:
        source_shapes: what the source's checkpoint holds.
        method: with its options.
        folds: how many neighbouring frequencies may share slots; the best is chosen per layer.
        residual: factor on everything that is added to the residual stream.
        config: the target's config.json.
        readings: what became of the rows of the calibration data.
        predictions: of the splits that were compared, where there was text to compare them on.
    """

    request: ConvertRequest
    source: Source
    source_config: PretrainedConfig
    spec: AttentionSpec
    skeleton: Skeleton
    reader: CheckpointReader
    source_shapes: Mapping[str, torch.Size]
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

    @property
    def needs_text(self) -> bool:
        """Whether the layers are fitted to calibration text."""
        return bool(self.request.calibration) and self.request.calibration != ("none",)

    @property
    def left_over(self) -> tuple[str, ...]:
        """Names of tensors that are no part of the model that is converted."""
        return left_over(self.reader.headers, self.source_shapes, self.spec.family)

    @property
    def live(self) -> bool:
        """Whether the latent norm is a real one."""
        return self.request.latent_norm == "fitted"

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """Read a source layer but for its experts, in its storage type, named as in transformers and relative to it."""
        prefix = self.spec.layer_prefix(index)
        names = [name for name in self.source_shapes if name.startswith(prefix) and not is_expert(name)]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self.reader.read(names).items()}
        shapes = {name.removeprefix(prefix): shape for name, shape in self.skeleton.shapes.items()}
        return as_class_names(tensors, self.spec.family, shapes)

    def experts(self, index: int) -> Iterator[Expert]:
        """Read the experts of a source layer one by one, in their storage type, stored singly or packed."""
        prefix, names, mixture = self.spec.layer_prefix(index), self.spec.family.experts, self.spec.mixture
        if names is None or mixture is None:
            return
        for number in range(mixture.num_experts):
            if prefix + DOWN in self.source_shapes:
                gate, up = self.reader.read_part(prefix + GATE_UP, number).chunk(2)
                expert = Expert(number, gate, up, self.reader.read_part(prefix + DOWN, number))
                del gate, up
            else:
                own = (prefix + name.format(number) for name in (names.gate, names.up, names.down))
                expert = Expert(number, *self.reader.read(own).values())
            yield expert
            # Before the next one is read, not after.
            del expert

    def attention_weights(
        self,
        tensors: Mapping[str, Tensor],
        layer: nn.Module | None = None,
        *,
        source: SourceStream | None = None,
        inputs: ResidualStream | None = None,
    ) -> AttentionWeights:
        """Take the attention of a source layer, in float32 on the device.

        Args:
            tensors: of the layer, as they were read.
            layer: the layer itself, and
            source: the stream in front of it, and
            inputs: the stream that the converted layer will meet: what is not linear is fitted on its first windows.
        """
        spec = self.spec

        def tensor(name: str, kind: str) -> Tensor:
            return tensors[f"{spec.family.attention}.{name}.{kind}"].to(self.device, torch.float32)

        weights = {name: tensor(name, "weight") for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        output_bias = None
        if spec.biased:
            # Attention shares out one in all, so what every value has in common is put out whatever it does.
            shared = tensor("v_proj", "bias").unflatten(0, (spec.num_key_value_heads, 1, spec.head_dim))
            output_bias = weights["o_proj"] @ shared.expand(-1, spec.num_key_value_groups, -1).flatten()
            if "o_proj" in spec.biases:
                output_bias = output_bias + tensor("o_proj", "bias")
            for name in ("q_proj", "k_proj"):
                weights[name] = torch.cat([weights[name], tensor(name, "bias").unsqueeze(1)], dim=1)
            weights["v_proj"] = nn.functional.pad(weights["v_proj"], (0, 1))
        if names := sorted(spec.nonlinear):
            assert layer is not None, "without text such a source is refused"
            assert source is not None, "without text such a source is refused"
            fit = slice(0, self.request.num_windows)
            gram = AttentionWeights.from_projections(spec, **weights).output_gram
            costs = token_costs(spec, source.projected(layer, fit, PROJECTIONS), gram)
            seen = (inputs or source).projected(layer, fit, names)
            projections = {name: weights[name] for name in names}
            weights |= nearest_linear(seen, costs, projections, ridge=self.method.options.linear_ridge)
        weights["q_proj"] = weights["q_proj"] * spec.logit_scale
        return AttentionWeights.from_projections(spec, **weights, output_bias=output_bias)

    def source_stream(self, windows: Int[Tensor, "windows tokens"]) -> SourceStream:
        """Return the source's residual stream in front of the first layer."""
        embedding = self.spec.family.embedding
        return SourceStream(
            self.skeleton,
            self.spec,
            self.reader.read([embedding])[embedding],
            windows,
            device=self.device,
            dtype=getattr(torch, self.request.compute_dtype),
            batch_size=self.request.batch_size,
        )

    @property
    def slot_frequencies(self) -> Float[Tensor, " slot"]:
        """Frequencies of the target's rotary slots."""
        if self.method.own_frequencies:
            return self.spec.frequencies.repeat(self.spec.num_key_value_heads).to(self.device)
        return target_frequencies(self.spec, self.sizes).to(self.device)

    def layer_goal(self, sizes: MLASizes, folds: tuple[int, ...]) -> LayerGoal:
        """Say what one layer is converted to, at ``sizes``."""
        return LayerGoal(
            # One number is for the length of the latent.
            kv_lora_rank=sizes.kv_lora_rank - self.live,
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

    def stored(self, name: str, weight: Tensor) -> Tensor:
        """Cast a copied weight to the storage type, once; scaled first if it writes to the residual stream."""
        residual = name.endswith((*self.spec.family.residual_writers, self.spec.family.embedding))
        if residual and self.residual != 1:
            weight = weight.to(self.device, torch.float32) * self.residual
        return weight.to(self.dtype)

    def identity(self, windows: Tensor | None) -> dict[str, Any]:
        """Return all that decides the output's bytes, by names that people know: only the same work is resumed."""
        request = self.request.model_dump(mode="json", exclude={"output_dir", "token"})
        headers = {name: (h.file, list(h.shape), str(h.dtype)) for name, h in sorted(self.reader.headers.items())}
        files = sorted({"config.json", *(header.file for header in self.reader.headers.values())})
        stamps = {name: file_stamp(self.source.folder / name) for name in files}
        return {
            **{name: f"{version}" for name, version in loaded_versions()},
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
        """Say what whoever starts the conversion should know."""
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


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def plan_conversion(request: ConvertRequest, *, overwrite: bool = False) -> ConversionPlan:
    """Open the source and settle everything but the numbers.

    Raises:
        TransMLAError: the request cannot be carried out; which part, and what would do.
    """
    find_method(request)  # Before anything is opened.
    opened = open_model(request)
    check_output(request.output_dir, source_folder=opened.source.folder, overwrite=overwrite)
    device = choose_device(request.device)
    if device.type == "mps":
        raise UsageError("The mps device has no float64, which the moments need: pass --device cpu.")
    choices = settle(request, opened.spec, stored=opened.headers[opened.spec.family.embedding].dtype)
    opened, reader = fetch_weights(opened, token=request.token)
    spec, sizes, dtype, norm = choices.spec, choices.sizes, choices.dtype, NORMS[request.profile]
    config = target_config(opened.config, spec, sizes, norm, dtype=dtype, exact=request.exact)
    # The stock class itself says which tensors a checkpoint of this config has.
    shapes = unpacked_shapes(Skeleton(load_target(config)).shapes, ExpertNames())
    tensors = [TensorPlan(name, tuple(shape), dtype) for name, shape in shapes.items()]
    shards = plan_shards(tensors, max_shard_size=request.max_shard_size)
    return ConversionPlan(
        request=request,
        source=opened.source,
        source_config=opened.config,
        spec=spec,
        skeleton=opened.skeleton,
        reader=reader,
        source_shapes=opened.shapes,
        device=device,
        method=choices.method,
        sizes=sizes,
        folds=choices.folds,
        norm=norm,
        residual=residual_scale(spec.rms_norm_eps, norm),
        dtype=dtype,
        config=config,
        shards=shards,
    )
