"""``transmla generate``: one prompt, answered or continued."""

from __future__ import annotations

import sys

from transmla.cli.output import show
from transmla.cli.progress import choose_progress
from transmla.cli.request_options import AsJson, Quiet, takes_request
from transmla.config import GenerateRequest
from transmla.errors import UsageError
from transmla.generate.report import GenerationReport


@takes_request("generate")
def generate_text(request: GenerateRequest, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Answer a prompt, or continue it where the model has no chat template; the text comes as it is made."""
    if request.prompt == "-":
        request = request.model_copy(update={"prompt": _read_standard_input()})

    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.generate.run import generate

    choose_progress(quiet=quiet)

    def tell(note: str) -> None:
        if not quiet:
            print(note, file=sys.stderr)

    def write(piece: str) -> None:
        if not as_json:
            print(piece, end="", flush=True)

    report = generate(request, write=write, tell=tell)
    # The text itself has been printed as it came.
    show(report, lambda report: "", as_json=as_json)
    if not (quiet or as_json):
        print(summary(report), file=sys.stderr)


def summary(report: GenerationReport) -> str:
    """Return in a line what the text took."""
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
