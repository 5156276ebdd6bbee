"""``transmla finetune``: a converted checkpoint in, a better one out."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from transmla.cli.progress import choose_progress, speaks, warn
from transmla.cli.push import PUSH_HELP, pushing
from transmla.cli.tables import facts_table, readable_bytes
from transmla.config import FinetuneRequest

if TYPE_CHECKING:
    from transmla.finetune.report import FinetunePlan, FinetuneReport

_help = FinetuneRequest.describe


def finetune_model(
    checkpoint: Annotated[str | None, typer.Argument(help=_help("checkpoint"))] = None,
    output_dir: Annotated[Path | None, typer.Argument(help=_help("output_dir"))] = None,
    dataset: Annotated[list[str] | None, typer.Option(help=_help("dataset"))] = None,
    eval_dataset: Annotated[list[str] | None, typer.Option(help=_help("eval_dataset"))] = None,
    text_column: Annotated[str | None, typer.Option(help=_help("text_column"))] = None,
    bos: Annotated[str | None, typer.Option(help=_help("bos"))] = None,
    overflow: Annotated[str | None, typer.Option(help=_help("overflow"))] = None,
    window: Annotated[int | None, typer.Option(help=_help("window"))] = None,
    num_eval_windows: Annotated[int | None, typer.Option(help=_help("num_eval_windows"))] = None,
    streaming: Annotated[bool | None, typer.Option("--streaming", help=_help("streaming"))] = None,
    teacher: Annotated[str | None, typer.Option(help=_help("teacher"))] = None,
    gguf_file: Annotated[str | None, typer.Option(help=_help("gguf_file"))] = None,
    revision: Annotated[str | None, typer.Option(help=_help("revision"))] = None,
    token: Annotated[str | None, typer.Option(help=_help("token"))] = None,
    teacher_dtype: Annotated[str | None, typer.Option(help=_help("teacher_dtype"))] = None,
    teacher_device: Annotated[str | None, typer.Option(help=_help("teacher_device"))] = None,
    teacher_top_k: Annotated[int | None, typer.Option(help=_help("teacher_top_k"))] = None,
    temperature: Annotated[float | None, typer.Option(help=_help("temperature"))] = None,
    ce_weight: Annotated[float | None, typer.Option(help=_help("ce_weight"))] = None,
    attention_weight: Annotated[float | None, typer.Option(help=_help("attention_weight"))] = None,
    train: Annotated[str | None, typer.Option(help=_help("train"))] = None,
    latent_norm: Annotated[str | None, typer.Option(help=_help("latent_norm"))] = None,
    lora_rank: Annotated[int | None, typer.Option(help=_help("lora_rank"))] = None,
    lora_alpha: Annotated[int | None, typer.Option(help=_help("lora_alpha"))] = None,
    learning_rate: Annotated[float | None, typer.Option(help=_help("learning_rate"))] = None,
    lr_scheduler_type: Annotated[str | None, typer.Option(help=_help("lr_scheduler_type"))] = None,
    warmup_steps: Annotated[float | None, typer.Option(help=_help("warmup_steps"))] = None,
    weight_decay: Annotated[float | None, typer.Option(help=_help("weight_decay"))] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help=_help("max_grad_norm"))] = None,
    optim: Annotated[str | None, typer.Option(help=_help("optim"))] = None,
    num_train_epochs: Annotated[float | None, typer.Option(help=_help("num_train_epochs"))] = None,
    max_steps: Annotated[int | None, typer.Option(help=_help("max_steps"))] = None,
    per_device_train_batch_size: Annotated[int | None, typer.Option(help=_help("per_device_train_batch_size"))] = None,
    per_device_eval_batch_size: Annotated[int | None, typer.Option(help=_help("per_device_eval_batch_size"))] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help=_help("gradient_accumulation_steps"))] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help=_help("gradient_checkpointing")),
    ] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help=_help("bf16"))] = None,
    eval_steps: Annotated[int | None, typer.Option(help=_help("eval_steps"))] = None,
    logging_steps: Annotated[int | None, typer.Option(help=_help("logging_steps"))] = None,
    save_total_limit: Annotated[int | None, typer.Option(help=_help("save_total_limit"))] = None,
    seed: Annotated[int | None, typer.Option(help=_help("seed"))] = None,
    report_to: Annotated[list[str] | None, typer.Option(help=_help("report_to"))] = None,
    device: Annotated[str | None, typer.Option(help=_help("device"))] = None,
    max_shard_size: Annotated[str | None, typer.Option(help=_help("max_shard_size"))] = None,
    config: Annotated[Path | None, typer.Option(help="YAML recipe; flags win over it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the data, show the plan with its memory, and stop.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this file (png, svg or pdf).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same request.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT_DIR if it holds a model.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help=PUSH_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Train a converted checkpoint, by default to say what its source says; one GPU, or many with accelerate launch."""
    request = FinetuneRequest.build(recipe=config, flags=locals())

    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    progress = choose_progress(quiet=quiet)
    if plot is not None:
        from transmla.cli.plots import check_plot

        check_plot(plot)
    if dry_run:
        from transmla.finetune.plan import plan_finetune

        plan = plan_finetune(request, overwrite=overwrite)
        for line in plan.not_learnt:
            warn(line)
        if as_json:
            print(plan.model_dump_json(indent=2))
        else:
            Console().print(plan_table(plan))
        return

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    # DeepSpeed, where it is installed, says on stdout what it does.
    with redirect_stdout(sys.stderr):
        from transmla.finetune.run import finetune

        with pushing(push_to_hub, request.output_dir, token=request.token):
            report = finetune(request, progress=progress, tell=tell, warn=warn, resume=resume, overwrite=overwrite)
    if plot is not None:
        from transmla.finetune.plot import plot_finetune

        plot_finetune(report, plot)
    # Of several processes, one speaks.
    if speaks():
        if as_json:
            print(report.model_dump_json(indent=2))
        else:
            Console().print(report_table(report))


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


def report_table(report: FinetuneReport) -> Table:
    """Lay out what was held out, within 80 columns."""
    table = Table(
        title=f"{report.checkpoint}: {report.num_heldout_sequences} held-out sequences of {report.window} tokens",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    for heading in ("Step", "Tokens seen", "Perplexity", "KL", "Loss", "Seconds", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in report.heldout:
        table.add_row(
            f"{point.step:,}",
            f"{point.num_tokens_seen:,}",
            f"{point.perplexity:.4f}",
            "-" if report.teacher is None else f"{point.kl:.4f}",
            f"{point.loss:.4f}",
            f"{point.seconds:,.0f}",
            "best" if point.step == report.best_step else "",
        )
    if report.steps and report.heldout and not report.best_step:
        table.caption = _NOTHING_GAINED
        table.caption_justify = "left"
    return table
