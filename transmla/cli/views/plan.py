"""A plan, a report and an inspection as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from transmla.arch.unread import READ_ELSEWHERE
from transmla.cli.views.facts import facts_table, readable_bytes, share
from transmla.convert.report import ConversionReport
from transmla.convert.summary import PlanSummary, Prediction


def plan_table(plan: PlanSummary) -> Table:
    """Lay a plan out for people, within 80 columns."""
    table = facts_table(f"{plan.model} → {plan.output_dir}")
    rows = {
        "Family": f"{plan.family}, {plan.num_layers} layers",
        "Method": plan.method,
        "KV cache": f"{plan.source_numbers_per_token_layer} → {plan.numbers_per_token_layer} numbers per token and "
        f"layer ({plan.kv_lora_rank} latent + {plan.qk_rope_head_dim} rotary)",
        "": _cached_bytes(plan),
        "Head sizes": f"nope {plan.qk_nope_head_dim}, rope {plan.qk_rope_head_dim}, value {plan.v_head_dim}"
        + (f", q_lora_rank {plan.q_lora_rank}" if plan.q_lora_rank else ""),
        "Output": f"{readable_bytes(plan.output_bytes)} in {plan.num_shards} file(s)",
        "Peak memory": f"about {readable_bytes(plan.peak_memory_bytes)}, of which the libraries take "
        f"{readable_bytes(plan.library_memory_bytes)}",
        "Engines": ", ".join(plan.engines) or "none takes these sizes; --engine NAME tells what it needs",
    }
    rows |= left_over_row(plan.left_over) | unread_row(plan.unread)
    for name, value in rows.items():
        table.add_row(name, value)
    for prediction in plan.predictions:
        table.add_row(
            "Predicted" if prediction == plan.predictions[0] else "",
            f"{prediction.kv_lora_rank} latent + {prediction.qk_rope_head_dim} rotary: "
            f"error {prediction.error:.3g} of the residual stream, for a mean layer{_parts(prediction)}",
        )
    return table


def _parts(prediction: Prediction) -> str:
    if prediction.key_error is None or prediction.value_error is None:
        return ""
    return f" (keys {prediction.key_error:.3g}, values {prediction.value_error:.3g})"


def _cached_bytes(plan: PlanSummary) -> str:
    before, after = f"{plan.source_kv_bytes_per_token:,}", f"{plan.kv_bytes_per_token:,}"
    if plan.source_dtype == plan.dtype:
        return f"{before} → {after} bytes per token in {plan.dtype} ({share(plan.share)})"
    of_bytes = share(plan.kv_bytes_per_token / plan.source_kv_bytes_per_token)
    return (
        f"{before} bytes per token in {plan.source_dtype} → {after} in {plan.dtype} "
        f"({share(plan.share)} of the numbers, {of_bytes} of the bytes)"
    )


def left_over_row(names: Sequence[str]) -> dict[str, str]:
    """Return the row of what of a checkpoint is not converted."""
    if not names:
        return {}
    return {"Left over": f"{len(names)} tensors that transformers does not read either, the first is {names[0]}"}


def unread_row(keys: Sequence[str]) -> dict[str, str]:
    """Name the keys of config.json that decide nothing in transformers, and in the result."""
    if not keys:
        return {}
    named = ", ".join(f"{key} ({READ_ELSEWHERE[key]})" if key in READ_ELSEWHERE else key for key in keys)
    return {"Unread": f"of config.json: {named}; transformers does not read it, and the result does without"}


def report_table(report: ConversionReport) -> Table:
    """Lay the result of a conversion out for people."""
    table = plan_table(report.plan)
    measured = [layer for layer in report.layers if layer.relative_error is not None]
    if measured:
        worst = max(measured, key=lambda layer: layer.relative_error or 0)
        table.add_row(
            "Error",
            f"residual stream on held-out windows off by: mean {report.mean_relative_error:.3g}, "
            f"worst {worst.relative_error:.3g} (layer {worst.layer})",
        )
    if report.num_healed is not None:
        table.add_row(
            "Healing", f"{report.num_healed} of {len(report.layers)} layers are better than their closed form"
        )
    table.add_row("Time", f"{report.seconds:.0f} s")
    return table
