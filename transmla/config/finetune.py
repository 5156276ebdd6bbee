"""What ``transmla finetune`` is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from transmla.config.request import BOS, Bos, OutputDtype, Request, as_tuple

Train = Literal["attention", "all", "lora"]
Overflow = Literal["cut", "split", "drop"]


class FinetuneRequest(Request):
    """What ``transmla finetune`` is asked; what belongs to the training is called as in ``TrainingArguments``."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("checkpoint", "output_dir")

    checkpoint: str = Field(description="A converted model, or for comparison any other: folder or hub id.")
    output_dir: Path = Field(description="Folder to create; it appears only when the training is complete.")

    dataset: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        min_length=1,
        description="Text, JSONL or parquet file, or hub data set name[:config[:split]]: text, or conversations in a "
        "column messages; repeat to mix several.",
    )
    eval_dataset: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (), description="Held-out data of the same kinds; by default the start of each --dataset is held out."
    )
    text_column: str | None = Field(
        None, description="Column that holds the text, or the messages; found by itself when there is one."
    )
    bos: Bos = BOS
    overflow: Overflow = Field(
        "cut",
        description="What becomes of a conversation longer than a sequence. cut: its end is lost; split: it goes on in "
        "the next ones; drop: it is left out. How much is lost is told.",
    )
    window: int = Field(512, ge=8, description="Tokens per sequence; several documents share one, and see only theirs.")
    num_eval_windows: int = Field(32, ge=1, description="Sequences that are held out.")
    repeats: float = Field(
        0.1,
        ge=0,
        le=4,
        description="Sequences in which random words and passages of the data are said twice, as a share of the "
        "others, and added to them: they keep copying. 0 turns them off.",
    )
    streaming: bool = Field(
        False, description="Read the data while training, instead of before; needs --max-steps, for its end is unknown."
    )

    teacher: str | None = Field(
        None,
        description="Model to learn from: hub id, id@revision or folder; none is cross-entropy alone. By default the "
        "source that the conversion recorded.",
    )
    gguf_file: str | None = Field(None, description="Name of a GGUF file of --teacher.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub --teacher.")
    token: str | None = Field(None, description="Hub token; the logged-in one is used by default.", exclude=True)
    teacher_dtype: OutputDtype = Field(
        "auto",
        description="Type in which the teacher runs; auto is bfloat16 with --bf16, else the stored one.",
    )
    teacher_device: str = Field("auto", description="Device of the teacher; auto is that of the training.")
    teacher_top_k: int | None = Field(
        None,
        ge=1,
        description="Have the teacher read everything once, before, and keep this many of its largest probabilities "
        "for each token on the disk; the teacher is not in memory then.",
    )
    temperature: float = Field(1.0, gt=0, description="Of both distributions in the divergence from the teacher.")
    ce_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the cross-entropy in the loss, the rest being the divergence from the teacher: 0.1 by "
        "default, 1 without a teacher.",
    )
    hard_label_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the tokens of each sequence, those of which the teacher is surest, that are learnt as "
        "they are (by cross-entropy alone) instead of from the teacher: distillation weakens copying. 0.2 by default.",
    )
    attention_weight: float = Field(
        0.0, ge=0, description="Weight of the relative error of each layer's attention output, besides."
    )

    train: Train = Field(
        "attention",
        description="What is trained. attention: its projections; all: every weight; lora: low-rank changes of the "
        "attention's projections, merged into what is saved (needs peft).",
    )
    latent_norm: Literal["keep", "fitted"] = Field(
        "keep",
        description="fitted: switch the latent norm on, fitted to the data and trained, for one latent number, so that "
        "the weights survive 8-bit blocks everywhere.",
    )
    lora_rank: int = Field(32, ge=1, description="Rank of --train lora.")
    lora_alpha: int = Field(64, gt=0, description="Scale of --train lora, as a multiple of 1/rank.")

    learning_rate: float = Field(2e-4, gt=0, description="Largest learning rate.")
    lr_scheduler_type: str = Field("cosine", description="How it falls.")
    warmup_steps: float = Field(0.02, ge=0, description="Steps, or below 1 the share of all steps, in which it rises.")
    weight_decay: float = Field(0.0, ge=0, description="Decay of trained matrices.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients that are longer are shortened.")
    optim: str = Field("adamw_torch_fused", description="Optimizer, by the name that Trainer has for it.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=0, description="Steps of the optimizer, instead of passes.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Sequences on each device at once.")
    per_device_eval_batch_size: int = Field(8, ge=1, description="The same when the held-out ones are measured.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches for one step of the optimizer.")
    gradient_checkpointing: bool = Field(
        False, description="Keep the inputs of the layers only, and compute the rest again: less memory, more time."
    )
    bf16: bool | None = Field(None, description="Products in bfloat16; by default on GPUs that have it.")
    eval_steps: int = Field(100, ge=1, description="Measure the held-out sequences and save every so many steps.")
    logging_steps: int = Field(10, ge=1, description="Log the loss every so many steps.")
    save_total_limit: int = Field(1, ge=1, description="Newest checkpoints to keep, besides the best.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the order of the data.")
    report_to: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (), description="Where Trainer logs to as well: tensorboard, wandb, and others; repeat for several."
    )
    training_arguments: dict[str, Any] = Field(
        default_factory=dict, description="Further TrainingArguments of Transformers; in a recipe only."
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto is a GPU where there is one.")
    max_shard_size: str = Field("5GB", description="Largest size of one weight file.")
