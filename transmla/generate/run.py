"""One prompt, answered or continued, with the text handed over as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

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
from transmla.generate.generation_config import read_settings
from transmla.generate.report import GenerationReport
from transmla.generate.sampling import listed_ids, overruled, settle_sampling
from transmla.generate.streamer import TextPieceStreamer
from transmla.modeling.absorption import has_latent_attention, set_form
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
    form: Form = "absorbed" if has_latent_attention(model) and not request.no_absorb else "expanded"
    set_form(model, form)
    model.generation_config = decoding
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        write(piece)

    streamer, strings = TextPieceStreamer(tokenizer, take), listed_ids(settings.heard.stop_strings)
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
    if new_tokens[-1] in listed_ids(config.eos_token_id) or any(string in text for string in strings):
        return "stop"
    if len(new_tokens) < config.max_new_tokens:
        # A stop string may begin in the prompt, or be a token that is not shown.
        return "stop" if config.max_time is None else "time"
    return "length" if len(new_tokens) == max_new_tokens else "context"
