"""One prompt, answered or continued, with the text handed over as it comes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from transmla.calibration.text import load_tokenizer
from transmla.checkpoint.source import open_source
from transmla.config import GenerateRequest
from transmla.device import choose_device
from transmla.errors import UsageError
from transmla.evaluate.cache import cached_tensors
from transmla.evaluate.models import loaded_versions, take_form
from transmla.evaluate.report import Form, GenerationReport
from transmla.evaluate.streaming import PieceStreamer
from transmla.modeling import has_latent_attention
from transmla.modeling.kv_cache import cache_of
from transmla.modeling.load import load_model, read_config


def generate(request: GenerateRequest, *, write: Callable[[str], object]) -> GenerationReport:
    """Answer the prompt, and call ``write`` with every piece of the text as soon as it is there.

    Raises:
        TransMLAError: the model, the prompt or the device cannot be used, or flags contradict each other.
    """
    device = choose_device(request.device)
    found = open_source(request.model, gguf_file=request.gguf_file, revision=request.revision, token=request.token)
    context = getattr(read_config(found), "max_position_embeddings", None)
    tokenizer = load_tokenizer(found)
    chat = tokenizer.chat_template is not None and not request.no_chat_template
    prompt = render_prompt(request, tokenizer, chat=chat)
    tokens = _tokenize(prompt, tokenizer, context=context, chat=chat)
    room = request.max_new_tokens if context is None else min(request.max_new_tokens, context - tokens.shape[1])

    model = load_model(found, dtype=request.dtype, device=device)
    form: Form = "absorbed" if has_latent_attention(model) and not request.stock else "stock"
    take_form(model, form)
    model.generation_config = settle_sampling(request, model.generation_config, max_new_tokens=room)
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        write(piece)

    streamer = PieceStreamer(tokenizer, take)
    torch.manual_seed(request.seed)
    started = time.perf_counter()
    output = model.generate(
        tokens.to(device),
        attention_mask=torch.ones_like(tokens, device=device),
        streamer=streamer,
        return_dict_in_generate=True,
    )

    new_tokens = output.sequences[0, tokens.shape[1] :].tolist()
    cached, num_cached = cached_tensors(cache_of(output)), cache_of(output).get_seq_length()
    numbers = sum(tensor.numel() for tensor in cached) / num_cached / model.config.num_hidden_layers
    first, last = streamer.times[0], streamer.times[-1]
    return GenerationReport(
        model=found.name,
        architecture=type(model).__name__,
        form=form,
        prompt=prompt,
        text="".join(pieces),
        finish=_why_it_stopped(new_tokens, model.generation_config, request.max_new_tokens),
        sampled=bool(model.generation_config.do_sample),
        num_prompt_tokens=tokens.shape[1],
        num_new_tokens=len(new_tokens),
        seconds_to_first_token=first - started,
        tokens_per_second=(len(new_tokens) - 1) / (last - first) if last > first else None,
        kv_bytes_per_token=sum(tensor.nbytes for tensor in cached) // num_cached,
        kv_numbers_per_token_layer=numbers,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        versions=loaded_versions(),
    )


def render_prompt(request: GenerateRequest, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    """Put the prompt into the model's chat template, or leave it as it is.

    Raises:
        UsageError: an empty prompt, or a system message that has no place.
    """
    if not request.prompt.strip():
        raise UsageError("The prompt is empty: write some text as PROMPT, or - and some text on standard input.")
    if not chat:
        if request.system is not None:
            why = "--no-chat-template was given" if request.no_chat_template else f"{request.model} has none"
            raise UsageError(f"--system needs a chat template, and {why}: drop --system.")
        return request.prompt
    messages = [{"role": "user", "content": request.prompt}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        remedy = "drop --system" if request.system is not None else "pass --no-chat-template"
        raise UsageError(f"The chat template of {request.model} refuses the prompt ({error}): {remedy}.") from None


def settle_sampling(request: GenerateRequest, given: GenerationConfig, *, max_new_tokens: int) -> GenerationConfig:
    """Combine flags over the model's own generation_config.

    Raises:
        UsageError: flags that shape the drawing although nothing is drawn.
    """
    config = copy.deepcopy(given)
    chosen = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    greedy = request.do_sample is False or chosen.get("temperature") == 0
    if greedy and (idle := [name for name, value in chosen.items() if value != 0 or name != "temperature"]):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise UsageError(f"Nothing is drawn with --no-do-sample or --temperature 0: drop it, or drop {flags}.")
    if greedy and request.do_sample:
        raise UsageError("--do-sample draws and --temperature 0 does not: drop one of them.")
    config.do_sample = not greedy and bool(request.do_sample or chosen or config.do_sample)
    for name in ("temperature", "top_p", "top_k"):
        setattr(config, name, chosen.get(name, getattr(config, name)) if config.do_sample else None)
    if request.repetition_penalty is not None:
        config.repetition_penalty = request.repetition_penalty
    # A length of the whole, which would only quarrel with that of the new tokens.
    config.max_length = None
    config.max_new_tokens = max_new_tokens
    if config.pad_token_id is None:
        config.pad_token_id = next(iter(_end_tokens(config)), 0)
    return config


def _tokenize(
    prompt: str, tokenizer: PreTrainedTokenizerBase, *, context: int | None, chat: bool
) -> Int[Tensor, "1 tokens"]:
    # A template writes the token that begins a text itself.
    tokens = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt", verbose=False)["input_ids"]
    if context is not None and tokens.shape[1] >= context:
        raise UsageError(
            f"The prompt has {tokens.shape[1]} tokens and the model a context of {context}, the answer included: "
            "shorten PROMPT."
        )
    return tokens


def _why_it_stopped(
    new_tokens: list[int], config: GenerationConfig, max_new_tokens: int
) -> Literal["stop", "length", "context"]:
    if new_tokens[-1] in _end_tokens(config):
        return "stop"
    return "length" if len(new_tokens) == max_new_tokens else "context"


def _end_tokens(config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
