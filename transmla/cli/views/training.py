"""A training, planned and done, at the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from transmla.cli.views.facts import facts_table, readable_bytes
from transmla.finetune.report import FinetunePlan, FinetuneReport


def plan_table(plan: FinetunePlan) -> Table:
    """Lay a plan out for people, within 80 columns."""
    memory = plan.memory
    table = facts_table(f"{plan.checkpoint} → {plan.output_dir}")
    sequences = "streamed" if plan.num_sequences is None else f"{plan.num_sequences:,} sequences"
    rows = {
        "Teacher": (plan.teacher or "none")
        + (f", over {plan.num_shared_tokens:,} shared tokens" if plan.num_shared_tokens else ""),
        "Trained": f"{plan.train}: {plan.num_trained_parameters:,} parameters",
        "Data": f"{sequences}, {plan.num_heldout_sequences:,} held out",
        "Steps": f"{plan.steps:,} of {plan.tokens_per_step:,} tokens",
        "Peak memory": f"about {readable_bytes(memory.peak)} on each device, where nothing is sharded",
        "": f"weights {readable_bytes(memory.frozen + memory.trained)}, optimizer "
        f"{readable_bytes(memory.optimizer)}, gradients {readable_bytes(memory.gradients)}, activations "
        f"{readable_bytes(max(memory.activations, memory.recomputed))}, teacher {readable_bytes(memory.teacher)}",
        "On the disk": f"{readable_bytes(plan.checkpoint_bytes)} a checkpoint while training",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


_NOTHING_GAINED = (
    "No step had less loss on what is held out, so these are the weights that came in: more steps or text, a smaller "
    "--learning-rate, or a larger --ce-weight if perplexity is what counts, may help."
)
_COPYING_SUFFERED = (
    "A step that says again what stands further up (Repeats) worse than the start is not published, whatever its loss: "
    "a smaller --learning-rate, or more --repeats, may help."
)


def report_table(report: FinetuneReport) -> Table:
    """Lay out what was held out, within 80 columns."""
    table = Table(
        title=f"{report.checkpoint}: {report.num_heldout_sequences} held-out sequences of {report.window} tokens",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    watched = any(point.repeat_nll is not None for point in report.heldout)
    for heading in ("Step", "Tokens seen", "Perplexity", "KL", "Loss", *(["Repeats"] * watched), "Seconds", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in report.heldout:
        table.add_row(
            f"{point.step:,}",
            f"{point.num_tokens_seen:,}",
            f"{point.perplexity:.4f}",
            "-" if report.teacher is None else f"{point.kl:.4f}",
            f"{point.loss:.4f}",
            *([f"{point.repeat_nll:.4f}"] if point.repeat_nll is not None else []),
            f"{point.seconds:,.0f}",
            "best" if point.step == report.best_step else "",
        )
    best = report.best
    if best is not None and any(point.loss < best.loss for point in report.heldout):
        table.caption = _COPYING_SUFFERED
    elif report.steps and report.heldout and not report.best_step:
        table.caption = _NOTHING_GAINED
    return table
