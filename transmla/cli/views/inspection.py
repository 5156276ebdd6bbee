"""A model, and what it can become, at the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from transmla.cli.views.facts import facts_table, readable_bytes, share
from transmla.cli.views.plan import left_over_row, unread_row
from transmla.convert.inspection import Inspection


def inspection_view(inspection: Inspection) -> Group:
    """Lay an inspection out for people, within 80 columns."""
    facts = facts_table(inspection.model)
    further = inspection.longest_context > inspection.max_position_embeddings
    raised = f" (--max-position-embeddings {inspection.longest_context} raises it)" if further else ""
    rows = {
        "Family": f"{inspection.family} ({inspection.model_type}), {inspection.num_parameters:,} parameters, "
        f"{inspection.dtype}",
        "Layers": f"{inspection.num_hidden_layers} of hidden size {inspection.hidden_size}",
        "Heads": f"{inspection.num_attention_heads} query, {inspection.num_key_value_heads} key/value, "
        f"size {inspection.head_dim}",
        "RoPE": f"{inspection.rope_type}, theta {inspection.rope_theta:g}, "
        f"context {inspection.max_position_embeddings:,}{raised}",
        "KV cache": f"{inspection.kv_numbers_per_token_layer} numbers per token and layer, "
        f"{inspection.kv_bytes_per_token:,} bytes per token, "
        f"{readable_bytes(inspection.kv_bytes_in_context)} for {inspection.context:,} tokens",
    }
    for name, value in (rows | left_over_row(inspection.left_over) | unread_row(inspection.unread)).items():
        facts.add_row(name, value)

    engines = Table(title="Engines", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    engines.add_column("Engine", no_wrap=True)
    engines.add_column("Loads", no_wrap=True)
    engines.add_column("With", no_wrap=True)
    engines.add_column("Share", justify="right", no_wrap=True)
    engines.add_column("In the way", overflow="fold")
    for verdict in inspection.engines:
        flags = [flag for flag in _telling(verdict.flags) if not flag.startswith("--engine")]
        cached = "" if verdict.share is None else share(verdict.share)
        engines.add_row(verdict.engine, verdict.loads, "\n".join(flags), cached, verdict.why)

    ways = Table(title="Can be converted", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    ways.add_column("With", no_wrap=True)
    ways.add_column("Result", no_wrap=True)
    ways.add_column("Latent\n+ rotary", justify="right", no_wrap=True)
    ways.add_column("KV for\ncontext", justify="right", no_wrap=True)
    ways.add_column("Share", justify="right", no_wrap=True)
    ways.add_column("Engines", overflow="fold")
    for way in inspection.candidates:
        ways.add_row(
            "\n".join(_telling(way.flags)),
            "exact" if way.exact else "approx.",
            f"{way.kv_lora_rank} + {way.qk_rope_head_dim}",
            readable_bytes(way.kv_bytes_in_context),
            share(way.share),
            ", ".join(way.engines) or "none",
        )
    return Group(facts, engines, ways)


def _telling(flags: Sequence[str]) -> list[str]:
    """Leave out what most ways have in common; the commands have it."""
    common = ("--calibration FILE", "--gguf-file", "--revision", "--max-position-embeddings")
    return [flag for flag in flags if not flag.startswith(common)]


def command_lines(command: str, *, width: int = 80) -> str:
    """Break a command line between words, so that it can be copied as it stands."""
    first, *words = map(shlex.quote, shlex.split(command))
    lines = [first]
    for word in words:
        # Room for the backslash that goes on.
        if len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)
