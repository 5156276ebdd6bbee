"""``transmla convert``: a GQA checkpoint in, an MLA checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from transmla.cli.progress import choose_progress, warn
from transmla.cli.push import PUSH_HELP, pushing
from transmla.config import ConvertRequest

_help = ConvertRequest.describe


def convert_model(
    model: Annotated[str | None, typer.Argument(help=_help("model"))] = None,
    output_dir: Annotated[Path | None, typer.Argument(help=_help("output_dir"))] = None,
    gguf_file: Annotated[str | None, typer.Option(help=_help("gguf_file"))] = None,
    revision: Annotated[str | None, typer.Option(help=_help("revision"))] = None,
    token: Annotated[str | None, typer.Option(help=_help("token"))] = None,
    kv_lora_rank: Annotated[int | None, typer.Option(help=_help("kv_lora_rank"))] = None,
    qk_rope_head_dim: Annotated[int | None, typer.Option(help=_help("qk_rope_head_dim"))] = None,
    kv_ratio: Annotated[float | None, typer.Option(help=_help("kv_ratio"))] = None,
    q_lora_rank: Annotated[int | None, typer.Option(help=_help("q_lora_rank"))] = None,
    max_position_embeddings: Annotated[int | None, typer.Option(help=_help("max_position_embeddings"))] = None,
    exact: Annotated[bool | None, typer.Option("--exact", help=_help("exact"))] = None,
    engine: Annotated[list[str] | None, typer.Option(help=_help("engine"))] = None,
    method: Annotated[str | None, typer.Option(help=_help("method"))] = None,
    freq_fold: Annotated[int | None, typer.Option(help=_help("freq_fold"))] = None,
    calibration: Annotated[list[str] | None, typer.Option(help=_help("calibration"))] = None,
    text_column: Annotated[str | None, typer.Option(help=_help("text_column"))] = None,
    bos: Annotated[str | None, typer.Option(help=_help("bos"))] = None,
    num_windows: Annotated[int | None, typer.Option(help=_help("num_windows"))] = None,
    window: Annotated[int | None, typer.Option(help=_help("window"))] = None,
    num_heldout_windows: Annotated[int | None, typer.Option(help=_help("num_heldout_windows"))] = None,
    batch_size: Annotated[int | None, typer.Option(help=_help("batch_size"))] = None,
    seed: Annotated[int | None, typer.Option(help=_help("seed"))] = None,
    heal_steps: Annotated[int | None, typer.Option(help=_help("heal_steps"))] = None,
    profile: Annotated[str | None, typer.Option(help=_help("profile"))] = None,
    latent_norm: Annotated[str | None, typer.Option(help=_help("latent_norm"))] = None,
    biases: Annotated[str | None, typer.Option(help=_help("biases"))] = None,
    dtype: Annotated[str | None, typer.Option(help=_help("dtype"))] = None,
    compute_dtype: Annotated[str | None, typer.Option(help=_help("compute_dtype"))] = None,
    device: Annotated[str | None, typer.Option(help=_help("device"))] = None,
    max_shard_size: Annotated[str | None, typer.Option(help=_help("max_shard_size"))] = None,
    config: Annotated[Path | None, typer.Option(help="YAML recipe; flags win over it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop at the plan; with text, predict errors first.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same request.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT_DIR when complete.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help=PUSH_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan or the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Convert a grouped-query attention checkpoint into a native DeepSeek-V3 one."""
    request = ConvertRequest.build(recipe=config, flags=locals())

    # Only now: PyTorch and Transformers take seconds to import, and --help must not wait for them.
    from transmla.cli.plan_view import plan_table, report_table
    from transmla.convert.run import convert, prepare
    from transmla.device import reuse_memory

    reuse_memory()
    progress = choose_progress(quiet=quiet)
    if dry_run:
        plan, _ = prepare(request, progress=progress, overwrite=overwrite, tell=warn)
        print(plan.summary.model_dump_json(indent=2)) if as_json else Console().print(plan_table(plan.summary))
        return
    with pushing(push_to_hub, request.output_dir, token=request.token):
        report = convert(request, progress=progress, resume=resume, overwrite=overwrite, tell=warn)
    print(report.model_dump_json(indent=2)) if as_json else Console().print(report_table(report))
