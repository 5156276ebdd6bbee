"""``transmla generate``: let a model speak."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from transmla.cli.progress import choose_progress
from transmla.config import GenerateRequest
from transmla.errors import UsageError
from transmla.generate.report import GenerationReport

_help = GenerateRequest.describe


def generate_text(
    model: Annotated[str | None, typer.Argument(help=_help("model"))] = None,
    prompt: Annotated[str | None, typer.Argument(help=_help("prompt"))] = None,
    system: Annotated[str | None, typer.Option(help=_help("system"))] = None,
    no_chat_template: Annotated[bool | None, typer.Option("--no-chat-template", help=_help("no_chat_template"))] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help=_help("max_new_tokens"))] = None,
    do_sample: Annotated[bool | None, typer.Option("--do-sample/--no-do-sample", help=_help("do_sample"))] = None,
    temperature: Annotated[float | None, typer.Option(help=_help("temperature"))] = None,
    top_p: Annotated[float | None, typer.Option(help=_help("top_p"))] = None,
    top_k: Annotated[int | None, typer.Option(help=_help("top_k"))] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help=_help("repetition_penalty"))] = None,
    seed: Annotated[int | None, typer.Option(help=_help("seed"))] = None,
    stock: Annotated[bool | None, typer.Option("--stock", help=_help("stock"))] = None,
    dtype: Annotated[str | None, typer.Option(help=_help("dtype"))] = None,
    device: Annotated[str | None, typer.Option(help=_help("device"))] = None,
    gguf_file: Annotated[str | None, typer.Option(help=_help("gguf_file"))] = None,
    revision: Annotated[str | None, typer.Option(help=_help("revision"))] = None,
    token: Annotated[str | None, typer.Option(help=_help("token"))] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print text and measurements as JSON, at the end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the text and nothing else.")] = False,
) -> None:
    """Answer a prompt, or continue it where the model has no chat template; the text comes as it is made."""
    request = GenerateRequest.build(recipe=None, flags=locals())
    if request.prompt == "-":
        request = request.model_copy(update={"prompt": _read_standard_input()})

    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.generate.run import generate

    choose_progress(quiet=quiet)

    def tell(note: str) -> None:
        if not quiet:
            print(note, file=sys.stderr)

    if as_json:
        print(generate(request, write=lambda piece: None, tell=tell).model_dump_json(indent=2))
        return
    report = generate(request, write=lambda piece: print(piece, end="", flush=True), tell=tell)
    print()
    if not quiet:
        print(summary(report), file=sys.stderr)


def summary(report: GenerationReport) -> str:
    """Say in a line what the text took."""
    speed = "" if report.tokens_per_second is None else f", {report.tokens_per_second:.1f} tokens/s"
    return (
        f"{report.architecture} ({report.form}): {report.num_prompt_tokens} + {report.num_new_tokens} tokens, "
        f"the first after {report.seconds_to_first_token:.2f} s{speed}; "
        f"it caches {report.kv_numbers_per_token_layer:g} numbers per token and layer, "
        f"{report.kv_bytes_per_token:,} bytes a token."
    )


def _read_standard_input() -> str:
    try:
        # Not what Python makes of it, which in some locales lets through what is no text.
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise UsageError("The prompt on standard input is not UTF-8 text.") from None
