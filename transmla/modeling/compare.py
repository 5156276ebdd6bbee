"""Models that are compared, and what must hold before they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from transmla.checkpoint.source import Source, open_source
from transmla.config import ComparisonRequest
from transmla.data.text import load_tokenizer
from transmla.data.vocabulary import SharedTokens, share_tokens
from transmla.errors import CheckpointError, UsageError
from transmla.modeling.load import read_config


def find_models(request: ComparisonRequest) -> list[Source]:
    """Find the source and then the converted models, and read no weight.

    Raises:
        TransMLAError: one of them is not there.
    """
    source = open_source(request.source, gguf_file=request.gguf_file, revision=request.revision, token=request.token)
    return [source, *(open_source(name, token=request.token) for name in request.converted)]


def check_comparable(models: Sequence[Source], *, window: int, flag: str = "--window") -> dict[str, SharedTokens]:
    """Refuse, before any weight is read, models whose tokens or contexts do not fit.

    Returns:
        The tokens that each model, by its folder, shares with the first one.

    Raises:
        CheckpointError: a config is missing, or a model has other tokens than the first one.
        UnsupportedModelError: a checkpoint that transformers loads but does not compute.
        UsageError: the window is longer than a model's context.
    """
    configs = [read_config(model) for model in models]
    contexts = [getattr(config, "max_position_embeddings", None) for config in configs]
    # A conversion may reach further than its source says (--max-position-embeddings), and so does its source then.
    contexts[0] = None if None in contexts else max(context for context in contexts if context is not None)
    for model, context in zip(models, contexts, strict=True):
        if context is not None and window > context:
            raise UsageError(f"{model.name} has a context of {context} tokens: lower {flag}, which is {window}.")
    sizes = [int(config.vocab_size) for config in configs]
    return {
        str(model.folder): _shared(models[0], model, sizes[0], size) for model, size in zip(models, sizes, strict=True)
    }


def told_of_vocabularies(models: Sequence[Source], shared: Mapping[str, SharedTokens]) -> Iterator[str]:
    """Yield a sentence for each model that has not all of the first one's tokens, and no others."""
    for model in models:
        tokens = shared[str(model.folder)]
        if not tokens.are_all:
            yield (
                f"{model.name} has {tokens.num_there:,} embeddings and {models[0].name} {tokens.num_here:,}: they are "
                f"compared over the {len(tokens):,} tokens that they share, whose probabilities are renormalized."
            )


def _shared(source: Source, model: Source, num_here: int, num_there: int) -> SharedTokens:
    who = f"{model.name}, which is compared with {source.name},"
    advice = "only a model that was converted from this source can be compared with it"
    if not _has_tokenizer(model) or not _has_tokenizer(source):
        if num_here != num_there:
            raise CheckpointError(f"{who} has {num_there} embeddings instead of {num_here}: {advice}.")
        return SharedTokens(num_here, num_there)
    here, there = load_tokenizer(source), load_tokenizer(model)
    return share_tokens(here, there, num_here=num_here, num_there=num_there, who=who, advice=advice)


def _has_tokenizer(model: Source) -> bool:
    """Return whether a tokenizer lies beside the weights; without one, a model reads what the source's gives."""
    return any(model.folder.glob("tokenizer*")) or any(model.folder.glob("*vocab*"))
