"""What a model's own ``generation_config.json`` asks for, and what becomes of it.

Every field that Transformers knows is in one of three tables: it is heard, and then has a type here; it is set aside,
and the user told why; or it can decide nothing here. A field that is in none of them, of a newer Transformers, is told.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig

from transmla.checkpoint.safe_paths import read_json
from transmla.checkpoint.source import Source
from transmla.errors import CheckpointError

FILE = "generation_config.json"

Share = Annotated[float, Field(ge=0, le=1)]
# Within what arithmetic bears.
Factor = Annotated[float, Field(ge=1e-4, le=1e4)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Length = Annotated[int, Field(ge=1, lt=2**31)]
# Longer runs than a context has never come twice, and all of them would be looked for.
Run = Annotated[int, Field(ge=0, le=2**20)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
End = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Words = Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
Word = Annotated[str, Field(min_length=1)]
Biases = Annotated[list[tuple[Annotated[list[Token], Field(min_length=1)], float]], Field(min_length=1)]


class Watermark(BaseModel):
    """A mark in what is written, by which it is known again."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    greenlist_ratio: Share = 0.25
    bias: float = 2.0
    hashing_key: Count = 15485863
    seeding_scheme: Literal["lefthash", "selfhash"] = "lefthash"
    context_width: Length = 1


class Heard(BaseModel):
    """The fields that are handed on, with what they may be; the lengths are weighed against the flag."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    max_length: Length | None = None
    max_new_tokens: Length | None = None
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    max_time: Annotated[float, Field(gt=0)] | None = None
    stop_strings: Word | list[Word] | None = None
    eos_token_id: End | list[End] | None = None
    forced_bos_token_id: Token | None = None
    forced_eos_token_id: Token | list[Token] | None = None

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    # Engines have -1 for what is 0 here: no limit.
    top_k: Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda value: max(value, 0))] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    top_h: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    eta_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None

    repetition_penalty: Factor | None = None
    encoder_repetition_penalty: Factor | None = None
    no_repeat_ngram_size: Run | None = None
    encoder_no_repeat_ngram_size: Run | None = None
    bad_words_ids: Words | None = None
    sequence_bias: Biases | None = None
    suppress_tokens: list[Token] | None = None
    begin_suppress_tokens: list[Token] | None = None
    exponential_decay_length_penalty: tuple[Count, Factor] | None = None
    guidance_scale: Annotated[float, Field(ge=-1e4, le=1e4)] | None = None
    remove_invalid_values: bool | None = None
    renormalize_logits: bool | None = None
    watermarking_config: Watermark | None = None

    cache_implementation: Literal["dynamic", "static"] | None = None
    disable_compile: bool | None = None
    prefill_chunk_size: Length | None = None


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""What shapes the drawing of a token, and is idle where none is drawn; its values that change nothing are below."""
IDLE = {"temperature": 1, "top_k": 50, "top_p": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}

_ONE_BY_ONE = "tokens are decoded one by one"
_BEAMS = "one text is followed from its start, without others to choose from at its end"
_ONE_TEXT = "one text is written"
_GONE = "transformers has no such decoding any more"
_CACHE = "the cache is an ordinary one, with which the text is that of the model itself"
ASIDE: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "constraints": ((), _BEAMS),
    "force_words_ids": ((), _BEAMS),
    "num_return_sequences": ((1,), _ONE_TEXT),
    "continuous_batching_config": ((), _ONE_TEXT),
    "penalty_alpha": ((0,), _GONE),
    "dola_layers": ((), _GONE),
    "use_mtp": ((False,), _ONE_BY_ONE),
    "prompt_lookup_num_tokens": ((), _ONE_BY_ONE),
    "assistant_early_exit": ((), _ONE_BY_ONE),
    "is_assistant": ((False,), _ONE_BY_ONE),
    "speculation_type": ((), _ONE_BY_ONE),
    "token_healing": ((False,), "the prompt stays as it is"),
    "use_cache": ((True,), "the text is the same with a cache, and comes sooner"),
    # Transformers itself takes the dynamic cache for a hybrid one.
    "cache_implementation": (("dynamic", "static", "hybrid"), _CACHE),
    "cache_config": (({},), _CACHE),
    "compile_config": (({},), "nothing is compiled but what transformers compiles by itself"),
}
"""What is told and set aside, with the values that ask for nothing."""

HARMLESS = frozenset(
    {
        # Of beams and of contrastive search.
        *("early_stopping", "length_penalty", "diversity_penalty", "low_memory"),
        # Of assisted decoding.
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
        # Room of a static cache, which has as much as one text needs.
        "max_cache_len",
        # What else is put out.
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        # There is a prompt, and nothing to pad it with; the encoder is another one's.
        *("pad_token_id", "bos_token_id", "decoder_start_token_id"),
        # Where a file comes from.
        *("transformers_version", "_from_model_config", "_commit_hash"),
    }
)
"""What decides nothing where one text follows one prompt, token by token."""


@dataclass(frozen=True)
class Settings:
    """What a model asks for.

    Attributes:
        where: file and model.
        heard: what it is given.
        notes: what it is not given, and why; a line for each reason.
    """

    where: str
    heard: Heard
    notes: tuple[str, ...]

    def config(self, **chosen: Any) -> GenerationConfig:
        """Return what is heard as Transformers wants it, without what else ends a text, and with what is chosen."""
        values = self.heard.model_dump(exclude_none=True, exclude={"max_length", "max_new_tokens", "stop_strings"})
        return GenerationConfig(**{**values, **chosen})


def read_settings(model: Source, *, vocab_size: int) -> Settings:
    """Read what a model asks for: from its ``generation_config.json``, or like Transformers from its ``config.json``.

    Raises:
        CheckpointError: a file cannot be read, or holds what cannot be.
    """
    file = FILE if (model.folder / FILE).is_file() else "config.json"
    values = read_json(model.folder, file)
    if file != FILE:
        parts = (values.get(name) for name in ("decoder", "generator", "text_config"))
        inner: dict[str, Any] = next((part for part in parts if part and isinstance(part, dict)), {})
        known = Heard.model_fields.keys() | ASIDE.keys() | HARMLESS
        values = {name: value for name, value in {**inner, **values}.items() if name in known}
    values = {name: value for name, value in values.items() if value is not None and value != []}
    where = f"{file} of {model.name}"
    aside = {name: value for name, value in values.items() if name in ASIDE and value not in ASIDE[name][0]}
    kept = {name: value for name, value in values.items() if name not in aside}
    if kept.get("cache_implementation") == "hybrid":
        del kept["cache_implementation"]
    try:
        heard = Heard.model_validate(kept)
        # What can never come ends nothing, and some penalties would look for its logit.
        ends = [token for token in _tokens(heard.eos_token_id) if 0 <= token < vocab_size]
        heard = heard.model_copy(update={"eos_token_id": ends or None})
        settings = Settings(where, heard, tuple(_notes(model, aside, values, where)))
        _check_tokens(heard, vocab_size)
        # Whether tokens are drawn is not settled yet, and values for that are no mistake.
        settings.config(do_sample=True)
    except ValidationError as error:
        problems = (
            f"{item['loc'][0]}: {item['msg']} (found {reprlib.repr(values[str(item['loc'][0])])})"
            for item in error.errors()
        )
        raise CheckpointError(f"The {where} is not valid: {'; '.join(dict.fromkeys(problems))}. Mend it.") from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The {where} is not valid: {reason.rstrip('.')}. Mend it.") from None
    return settings


def _notes(model: Source, aside: Mapping[str, Any], values: Mapping[str, Any], where: str) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for name, value in aside.items():
        reasons.setdefault(ASIDE[name][1], []).append(f"{name} {reprlib.repr(value)}")
    for reason, asked in reasons.items():
        yield f"Set aside from {where}: {', '.join(asked)}, for {reason}."
    if unknown := sorted(values.keys() - Heard.model_fields.keys() - ASIDE.keys() - HARMLESS):
        yield f"Not heard from {where}: {', '.join(unknown)}, which nobody here knows."
    if (model.folder / "custom_generate").exists():
        yield f"Not run: custom_generate of {model.name}, for no code of a model is."


def _check_tokens(heard: Heard, vocab_size: int) -> None:
    if heard.exponential_decay_length_penalty and not heard.eos_token_id:
        raise ValueError("exponential_decay_length_penalty needs an eos_token_id, and there is none")
    for name in ("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "sequence_bias"):
        for token in _tokens(getattr(heard, name)):
            if token >= vocab_size:
                raise ValueError(f"{name} names the token {token}, but the model has only {vocab_size} embeddings")


def _tokens(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tokens(part)
