"""A source, opened and judged: the one path that every look at a model goes, so that all hear the same reason.

What the folder is comes first, then what the config is, then what the headers hold, then which contexts are possible:
a reason that a flag can do away with comes after all that none can.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from transformers import PretrainedConfig

from transmla.arch.admission import admit
from transmla.arch.class_names import class_names
from transmla.arch.purpose import check_head
from transmla.arch.skeleton import Skeleton
from transmla.arch.spec import AttentionSpec, describe
from transmla.arch.weight_names import check_depth, left_over, stored_shapes
from transmla.checkpoint.contents import check_no_other_purpose, telling_files
from transmla.checkpoint.quantized import check_unquantized
from transmla.checkpoint.reader import CheckpointReader, check_headers
from transmla.checkpoint.safetensors import TensorHeader
from transmla.checkpoint.source import Source, open_source, remote_headers
from transmla.config import ConvertRequest, InspectRequest


@dataclass(frozen=True, eq=False)
class OpenedSource:
    """A model that is known to be convertible in itself, whatever sizes are asked for.

    Attributes:
        headers: of all stored tensors, under the names that the class has for them.
        shapes: what a checkpoint must hold, under the names and in the layout that it has.
    """

    source: Source
    config: PretrainedConfig
    spec: AttentionSpec
    skeleton: Skeleton
    headers: Mapping[str, TensorHeader]
    shapes: Mapping[str, torch.Size]

    @property
    def left_over(self) -> tuple[str, ...]:
        """Names of tensors that are no part of the model that is converted."""
        return left_over(self.headers, self.shapes, self.spec.family)


def open_model(request: InspectRequest | ConvertRequest) -> OpenedSource:
    """Find a model and judge it by its config and its headers, before one weight is fetched.

    Raises:
        UnsupportedModelError: it cannot be converted; the exact reason.
        CheckpointError: it is absent, incomplete or contradicts itself.
        UsageError: a context that it does not have.
    """
    source = open_source(
        request.model, gguf_file=request.gguf_file, revision=request.revision, token=request.token, weights=False
    )
    config = admit(source.folder)
    check_no_other_purpose(request.model, source.folder)
    # At a context of one token nothing is refused that a flag could change.
    final = describe(config, max_position_embeddings=1)
    headers = _class_headers(remote_headers(source, token=request.token), final)
    skeleton, shapes = _check_held(headers, final, config, source)
    spec = describe(config, max_position_embeddings=request.max_position_embeddings)
    return OpenedSource(source, config, spec, skeleton, headers, shapes)


def fetch_weights(opened: OpenedSource, *, token: str | None) -> tuple[OpenedSource, CheckpointReader]:
    """Fetch the weights of a model on the hub; one that is here stays as it is.

    Raises:
        CheckpointError: weights that are out of reach, or not those whose headers were judged.
    """
    source, headers = opened.source, opened.headers
    if source.repo_id is not None and not _is_staged(source):
        fetched = open_source(source.repo_id, revision=source.revision, token=token)
        source = replace(source, folder=fetched.folder)
        headers = _class_headers(CheckpointReader(source.folder).headers, opened.spec)
        check_headers(headers, opened.shapes)
    return replace(opened, source=source, headers=headers), CheckpointReader(source.folder, headers)


def _is_staged(source: Source) -> bool:
    """Return whether a model of the hub was a GGUF file, which is here already as safetensors."""
    return source.folder.name != source.revision


def _class_headers(headers: Mapping[str, TensorHeader], spec: AttentionSpec) -> Mapping[str, TensorHeader]:
    names = class_names(headers, spec.family)
    return MappingProxyType({names[name]: replace(header, name=names[name]) for name, header in headers.items()})


def _check_held(
    headers: Mapping[str, TensorHeader], spec: AttentionSpec, config: PretrainedConfig, source: Source
) -> tuple[Skeleton, Mapping[str, torch.Size]]:
    """Make sure that the headers are of all the tensors of the model, and of floats."""
    family, tied = spec.family, bool(config.tie_word_embeddings)
    check_depth(spec, headers)
    skeleton = Skeleton(config)
    # A tied head may be stored all the same, and then counts as stock transformers counts it.
    shapes = stored_shapes(skeleton.shapes, family, headers, tied=tied and family.head not in headers)
    check_unquantized(headers, shapes, telling_files(source.folder))
    check_head(headers, family, tied=tied)
    check_headers(headers, shapes)
    return skeleton, shapes
