"""One prompt, answered or continued, with the text handed over as it comes."""

from __future__ import annotations

import reprlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StopStringCriteria

from transmla.checkpoint.source import open_source
from transmla.config import GenerateRequest
from transmla.data.template import choose_template
from transmla.data.text import load_tokenizer
from transmla.data.tokens import check_known, encode_text
from transmla.device import choose_device
from transmla.errors import UsageError
from transmla.evaluate.generation_config import IDLE, SAMPLING, Heard, Settings, read_settings
from transmla.evaluate.report import GenerationReport
from transmla.evaluate.streaming import PieceStreamer
from transmla.modeling import has_latent_attention
from transmla.modeling.absorption import set_form
from transmla.modeling.kv_cache import cache_of, use_of_cache
from transmla.modeling.load import load_model, read_config
from transmla.records import Form
from transmla.versions import loaded_versions


def generate(
    request: GenerateRequest, *, write: Callable[[str], object], tell: Callable[[str], object] = lambda note: None
) -> GenerationReport:
    """Answer the prompt, and call ``write`` with every piece of the text as soon as it is there.

    Args:
        request: what is wanted.
        write: takes the text.
        tell: takes, before the text, a line for each thing that the model asks for and is not given.

    Raises:
        TransMLAError: the model, the prompt or the device cannot be used, or flags contradict each other.
    """
    device = choose_device(request.device)
    found = open_source(request.model, gguf_file=request.gguf_file, revision=request.revision, token=request.token)
    config = read_config(found)
    context = getattr(config, "max_position_embeddings", None)
    tokenizer = load_tokenizer(found)
    chat = bool(tokenizer.chat_template) and not request.no_chat_template
    prompt = render_prompt(request, tokenizer, chat=chat)
    tokens = _tokenize(prompt, tokenizer, context=context, chat=chat)
    check_known(tokens, vocab_size=config.vocab_size)
    room = request.max_new_tokens if context is None else min(request.max_new_tokens, context - tokens.shape[1])
    settings = read_settings(found, vocab_size=config.vocab_size)
    lengths = {"num_prompt_tokens": tokens.shape[1], "max_new_tokens": room}
    decoding = settle_sampling(request, settings.heard, **lengths)
    notes = (*settings.notes, *overruled(request, settings, **lengths))
    for note in notes:
        tell(note)

    model = load_model(found, dtype=request.dtype, device=device)
    form: Form = "absorbed" if has_latent_attention(model) and not request.stock else "expanded"
    set_form(model, form)
    model.generation_config = decoding
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        write(piece)

    streamer, strings = PieceStreamer(tokenizer, take), _listed(settings.heard.stop_strings)
    torch.manual_seed(request.seed)
    started = time.perf_counter()
    output = model.generate(
        tokens.to(device),
        attention_mask=torch.ones_like(tokens, device=device),
        generation_config=decoding,
        # Not as a part of the config: with it, the tokenizer would be handed to every layer.
        stopping_criteria=[StopStringCriteria(tokenizer, strings)] if strings else None,
        streamer=streamer,
    )

    new_tokens = output.sequences[0, tokens.shape[1] :].tolist()
    use = use_of_cache(cache_of(output), config)
    first, last = streamer.times[0], streamer.times[-1]
    return GenerationReport(
        model=found.name,
        architecture=type(model).__name__,
        form=form,
        prompt=prompt,
        text="".join(pieces),
        finish=_why_it_stopped(new_tokens, decoding, request.max_new_tokens, strings, "".join(pieces)),
        sampled=bool(decoding.do_sample),
        num_prompt_tokens=tokens.shape[1],
        num_new_tokens=len(new_tokens),
        seconds_to_first_token=first - started,
        tokens_per_second=(len(new_tokens) - 1) / (last - first) if last > first else None,
        kv_bytes_per_token=use.bytes_per_token,
        kv_numbers_per_token_layer=use.numbers_per_token_layer,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        versions=loaded_versions(),
        notes=notes,
    )


def render_prompt(request: GenerateRequest, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    """Put the prompt into the model's chat template, or leave it as it is.

    Raises:
        UsageError: an empty prompt, a system message that has no place, or a template that does not take them.
    """
    if not request.prompt.strip():
        raise UsageError("The prompt is empty: write some text as PROMPT, or - and some text on standard input.")
    if not chat:
        if request.system is not None:
            why = "--no-chat-template was given" if request.no_chat_template else f"{request.model} has none"
            raise UsageError(f"--system needs a chat template, and {why}: drop --system.")
        return request.prompt
    template = choose_template(tokenizer.chat_template)
    if template is None:
        raise UsageError(
            f"{request.model} has several chat templates ({', '.join(tokenizer.chat_template)}), and none of them is "
            "the default: pass --no-chat-template."
        )
    messages = [{"role": "user", "content": request.prompt}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    try:
        prompt = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return str(prompt)
    # Templates are small programs, and fail in all the ways that programs do.
    except Exception as error:
        remedy = "drop --system" if request.system is not None else "pass --no-chat-template"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"The chat template of {request.model} refuses the prompt ({reason}): {remedy}.") from None


def settle_sampling(
    request: GenerateRequest, heard: Heard, *, num_prompt_tokens: int, max_new_tokens: int
) -> GenerationConfig:
    """Combine flags over the model's own generation_config.

    Raises:
        UsageError: flags that shape the drawing although nothing is drawn.
    """
    chosen = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    greedy = request.do_sample is False or _is_cold(chosen.get("temperature"))
    if greedy and (idle := [name for name, value in chosen.items() if name != "temperature" or not _is_cold(value)]):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise UsageError(f"Nothing is drawn with --no-do-sample or --temperature 0: drop it, or drop {flags}.")
    if greedy and request.do_sample:
        raise UsageError("--do-sample draws and --temperature 0 does not: drop one of them.")
    own = heard.do_sample and not _is_cold(heard.temperature)
    values = heard.model_dump(exclude_none=True, exclude={"max_length", "min_length", "stop_strings"})
    values["do_sample"] = not greedy and bool(request.do_sample or chosen or own)
    if not values["do_sample"]:
        values = {name: value for name, value in values.items() if name not in SAMPLING}
        chosen = {}
    if request.repetition_penalty is not None:
        values["repetition_penalty"] = request.repetition_penalty
    # Of both, Transformers takes the one of the new tokens, and warns of what is more than there will be.
    least = heard.min_new_tokens if heard.min_new_tokens is not None else (heard.min_length or 0) - num_prompt_tokens
    if least > 0:
        values["min_new_tokens"] = min(least, max_new_tokens)
    values |= {
        **chosen,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": next(iter(_listed(heard.eos_token_id)), 0),
        "return_dict_in_generate": True,
    }
    return GenerationConfig(**values)


def overruled(
    request: GenerateRequest, settings: Settings, *, num_prompt_tokens: int, max_new_tokens: int
) -> Iterator[str]:
    """Yield a line for each thing that a flag, or its default, or Transformers overrules."""
    heard = settings.heard
    length = None if heard.max_length is None else heard.max_length - num_prompt_tokens
    # Of both, Transformers takes the one of the new tokens.
    name, own = ("max_length", length) if heard.max_new_tokens is None else ("max_new_tokens", heard.max_new_tokens)
    if own is not None and own < max_new_tokens:
        value = getattr(heard, name)
        yield f"Set aside from {settings.where}: {name} {value}, for --max-new-tokens is {request.max_new_tokens}."
    flags = (request.do_sample, request.temperature, request.top_p, request.top_k)
    if not heard.do_sample and all(flag is None for flag in flags):
        own_values = heard.model_dump(include=set(SAMPLING), exclude_none=True)
        idle = [f"{name} {reprlib.repr(v)}" for name, v in own_values.items() if v != IDLE.get(name)]
        if idle:
            yield (
                f"Of no effect in {settings.where}, as in transformers: {', '.join(idle)}, for it does not say "
                "do_sample; --do-sample does."
            )


def _tokenize(
    prompt: str, tokenizer: PreTrainedTokenizerBase, *, context: int | None, chat: bool
) -> Int[Tensor, "1 tokens"]:
    # A template writes the token that begins a text itself.
    found = (
        tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if chat
        else encode_text(prompt, tokenizer)
    )
    tokens = torch.tensor([found], dtype=torch.int64)
    if not found:
        raise UsageError("The prompt has no tokens, as the tokenizer reads it: write other text as PROMPT.")
    if context is not None and tokens.shape[1] >= context:
        raise UsageError(
            f"The prompt has {tokens.shape[1]} tokens and the model a context of {context}, the answer included: "
            "shorten PROMPT."
        )
    return tokens


def _why_it_stopped(
    new_tokens: list[int], config: GenerationConfig, max_new_tokens: int, strings: Sequence[str], text: str
) -> Literal["stop", "length", "context", "time"]:
    if new_tokens[-1] in _listed(config.eos_token_id) or any(string in text for string in strings):
        return "stop"
    if len(new_tokens) < config.max_new_tokens:
        # A stop string may begin in the prompt, or be a token that is not shown.
        return "stop" if config.max_time is None else "time"
    return "length" if len(new_tokens) == max_new_tokens else "context"


def _is_cold(temperature: float | None) -> bool:
    # Logits divided by less are no numbers any more.
    return temperature is not None and temperature < 1e-5


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
