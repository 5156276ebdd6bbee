"""What the user asks for: frozen requests that read and write YAML recipes.

Each field is described once, here; the command line takes its help text from the same place.
Flags win over the recipe, the recipe wins over the defaults, and a flag that was not given is ``None``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from transmla.errors import UsageError

Method = Literal["complex", "rorope"]
Profile = Literal["portable", "quantizable"]
LatentNorm = Literal["neutral", "live"]
Biases = Literal["keep", "fold"]
EngineName = Literal["transformers", "vllm", "vllm-cpu", "sglang", "llama.cpp", "mlx"]
OutputDtype = Literal["auto", "float32", "bfloat16", "float16"]
ComputeDtype = Literal["float32", "bfloat16"]

Train = Literal["attention", "all", "lora"]

_ARGUMENTS = ("model", "output_dir", "source", "converted", "prompt", "checkpoint")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _split_at_commas(value: Any) -> Any:
    """Take ``512,2048`` for two numbers, as one word or as one of several."""
    words = [value] if isinstance(value, str | int) else value
    if not isinstance(words, list | tuple):
        return value
    return tuple(part for word in words for part in (word.split(",") if isinstance(word, str) else [word]))


class Request(BaseModel):
    """A frozen set of choices; unknown keys are refused rather than ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def describe(cls, field: str) -> str:
        """Return the one description of ``field`` with its choices and default, for help texts."""
        info = cls.model_fields[field]
        notes = []
        if get_origin(info.annotation) is Literal:
            notes.append(", ".join(get_args(info.annotation)))
        if info.default not in (None, PydanticUndefined, False, ()):
            notes.append(f"default {info.default}")
        return f"{info.description} ({'; '.join(notes)})" if notes else f"{info.description}"

    @classmethod
    def build(cls, *, recipe: Path | None, flags: dict[str, Any]) -> Self:
        """Combine flags over a YAML recipe over the defaults.

        Args:
            recipe: the YAML file, if there is one.
            flags: the arguments of a command by name, where ``None`` and an empty list mean that nothing was said;
                those that are no field of the request are the command's own.

        Raises:
            UsageError: the recipe cannot be read, or a value is unknown or out of range; all problems at once.
        """
        given = {name: flags[name] for name in cls.model_fields if flags.get(name) not in (None, [])}
        values = {**(read_recipe(recipe) if recipe else {}), **given}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(
                f"{flag_name(str(item['loc'][0]))}: {item['msg']} (found {item['input']!r})"
                if item["type"] != "missing"
                else f"{flag_name(str(item['loc'][0]))} is missing"
                for item in error.errors()
            )
            raise UsageError(f"The request is not valid: {problems}.") from None

    def to_yaml(self) -> str:
        """Write every resolved choice as a recipe that runs again as it is."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def flag_name(field: str) -> str:
    """Spell a field as the command line does: an argument in capitals, a flag with hyphens."""
    return field.upper() if field in _ARGUMENTS else "--" + field.replace("_", "-")


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe into plain keys.

    Raises:
        UsageError: absent, not YAML, or not a mapping of keys to values.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise UsageError(f"The recipe {path} must be a mapping of keys to values, found {type(values).__name__}.")
    return values


class SourceRequest(Request):
    """Where a source model comes from."""

    model: str = Field(description="Hub id, id@revision, or a folder with config.json and safetensors.")
    gguf_file: str | None = Field(None, description="Name of a GGUF file inside MODEL; it is dequantised first.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    token: str | None = Field(None, description="Hub token; the logged-in one is used by default.", exclude=True)


_MAX_POSITION_EMBEDDINGS: Any = Field(
    None,
    ge=1,
    description="Longest context of the result, in tokens; the source's by default. A model with a sliding window, or "
    "with a RoPE that changes on the way, can be converted for contexts within.",
)


class InspectRequest(SourceRequest):
    """What ``transmla inspect`` is asked."""

    context: int = Field(8192, ge=1, description="Context length, in tokens, for which the KV cache is added up.")
    max_position_embeddings: int | None = _MAX_POSITION_EMBEDDINGS


class ConvertRequest(SourceRequest):
    """What ``transmla convert`` is asked."""

    output_dir: Path = Field(description="Folder to create; it appears only when it is complete.")

    kv_lora_rank: int | None = Field(None, ge=1, description="Latent numbers cached per token and layer.")
    qk_rope_head_dim: int | None = Field(None, ge=2, description="Rotary key numbers cached per token and layer.")
    kv_ratio: float | None = Field(
        None, gt=0, le=1, description="Converted KV cache as a share of the source's; the tool picks the split."
    )
    max_position_embeddings: int | None = _MAX_POSITION_EMBEDDINGS
    q_lora_rank: int | None = Field(None, ge=1, description="Rank of the query projection; full by default.")
    exact: bool = Field(False, description="Write the same model as MLA: equal logits at equal cache size.")
    engine: Annotated[tuple[EngineName, ...], BeforeValidator(_as_tuple)] = Field(
        (), description=f"Engine that must load the result; repeat for several ({', '.join(get_args(EngineName))})."
    )

    method: Method = Field(
        "complex", description="complex: attention-weighted, in the output metric; rorope: the TransMLA paper's."
    )
    freq_fold: int | None = Field(
        None, ge=1, description="Neighbouring frequencies that share rotary slots; chosen per layer by default."
    )

    calibration: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        (),
        description="Text, JSONL or parquet file, hub data set name[:config[:split]], or none (weights only); "
        "repeat to mix several, an equal share of the windows each.",
    )
    text_column: str | None = Field(None, description="Column that holds the text; found by itself when there is one.")
    num_windows: int = Field(128, ge=1, description="Number of calibration windows to fit on.")
    window: int = Field(256, ge=8, description="Tokens per calibration window.")
    num_heldout_windows: int = Field(8, ge=1, description="Further windows, never fitted on, for the reported errors.")
    batch_size: int = Field(8, ge=1, description="Calibration windows per forward pass.")
    seed: int = Field(0, ge=0, description="Seed of the choice of windows.")

    heal_steps: int = Field(
        0,
        ge=0,
        description="Steps of Adam for a converted layer, on average: early layers get more, late ones fewer.",
    )

    profile: Profile = Field(
        "portable", description="portable loads everywhere; quantizable is for vLLM, SGLang and llama.cpp only."
    )
    latent_norm: LatentNorm = Field(
        "neutral",
        description="neutral: the engines' norm on the latent does nothing; live: it is a fitted one, and the weights "
        "survive 8-bit blocks everywhere, for one latent number.",
    )
    biases: Biases = Field(
        "keep",
        description="What becomes of biases on queries, keys and values. keep: they stay, for transformers and MLX; "
        "fold: into the weights, by a functional of the input that is nearly one, for all engines.",
    )
    dtype: OutputDtype = Field("auto", description="Storage type of the written weights; auto keeps the source's.")
    compute_dtype: ComputeDtype = Field("float32", description="Type of the matrix products when layers run over text.")
    device: str = Field("auto", description="Device of the computation: auto, cpu, cuda, cuda:1, mps.")
    max_shard_size: str = Field("5GB", description="Largest size of one weight file.")


class ComparisonRequest(Request):
    """A source and what it is compared with."""

    source: str = Field(description="The model that the others are compared with: hub id, id@revision or folder.")
    converted: tuple[str, ...] = Field((), description="Converted models: folders or hub ids.")
    gguf_file: str | None = Field(None, description="Name of a GGUF file inside SOURCE.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub SOURCE.")
    token: str | None = Field(None, description="Hub token; the logged-in one is used by default.", exclude=True)


class EvalRequest(ComparisonRequest):
    """What ``transmla eval`` is asked."""

    dataset: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="Text, JSONL or parquet file, or hub data set name[:config[:split]]; repeat for several."
    )
    text_column: str | None = Field(None, description="Column that holds the text; found by itself when there is one.")
    window: int = Field(1024, ge=2, description="Tokens that are read at once.")
    stride: int | None = Field(
        None,
        ge=1,
        description="Tokens by which windows advance, and only new ones count; by default they stand side by side.",
    )
    per_document: bool = Field(False, description="Judge each row of a data set by itself.")
    max_tokens: int | None = Field(
        None, ge=2, description="Stop after this many tokens of each data set; the whole text by default."
    )
    tasks: Annotated[tuple[str, ...], BeforeValidator(_split_at_commas)] = Field(
        (),
        description="Tasks of lm-eval by name, or YAML or JSONL files of them. Repeat, or separate by commas. Needs "
        "lm-eval.",
    )
    num_fewshot: int | None = Field(None, ge=0, description="Solved items before each; by default what the task says.")
    limit: int | None = Field(None, ge=1, description="Items of each task; all by default.")
    contexts: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(_split_at_commas)] = Field(
        (),
        description="Lengths, in tokens, at which models look for a needle in a haystack, and copy. Repeat, or "
        "separate by commas.",
    )
    num_depths: int = Field(5, ge=1, description="Depths at which needles are hidden, from start to end.")
    num_trials: int = Field(8, ge=1, description="Texts for each length and depth.")
    greedy_prompts: int = Field(
        0,
        ge=0,
        description="Windows of the first data set behind whose starts the source writes, and the others follow.",
    )
    greedy_tokens: int = Field(128, ge=1, description="Tokens that it writes.")
    per_layer: bool = Field(
        False, description="Put the converted layers into the source one at a time, to see where the loss comes from."
    )
    layer_windows: int = Field(4, ge=1, description="Windows of the first data set for --per-layer.")
    speed_contexts: Annotated[tuple[Annotated[int, Field(ge=64)], ...], BeforeValidator(_split_at_commas)] = Field(
        (), description="Context lengths at which all models are timed, as bench does. Repeat, or separate by commas."
    )
    batch_size: int = Field(1, ge=1, description="Windows, or answers, per forward pass.")
    dtype: ComputeDtype = Field("float32", description="Type in which the models run.")
    device: str = Field("auto", description="Device of the computation: auto, cpu, cuda, cuda:1, mps.")
    no_cache: bool = Field(
        False,
        description="Measure everything again, and keep nothing; results are otherwise kept in ~/.cache/transmla/eval, "
        "or under $TRANSMLA_CACHE.",
    )


class GenerateRequest(SourceRequest):
    """What ``transmla generate`` is asked."""

    prompt: str = Field(description="What the model answers or continues; - reads it from standard input.")
    system: str | None = Field(None, description="System message before the prompt, for models with a chat template.")
    no_chat_template: bool = Field(False, description="Continue the prompt as it is, chat template or not.")
    max_new_tokens: int = Field(256, ge=1, description="Stop after this many tokens.")
    do_sample: bool | None = Field(
        None,
        description="Draw tokens rather than take the likeliest. By default as the model's generation_config says, and "
        "yes where a temperature, top-p or top-k is given.",
    )
    temperature: float | None = Field(None, ge=0, description="Below 1 prefers likely tokens; 0 is --no-do-sample.")
    top_p: float | None = Field(None, gt=0, le=1, description="Draw from the likeliest tokens that have this share.")
    top_k: int | None = Field(None, ge=0, description="Draw from this many of the likeliest tokens; 0 is all.")
    repetition_penalty: float | None = Field(None, gt=0, description="Above 1 avoids tokens that are there already.")
    seed: int = Field(0, ge=0, description="Seed of the drawing (default 0): the same command gives the same text.")
    stock: bool = Field(
        False, description="Decode as stock transformers does, which expands the latent of every token at every step."
    )
    dtype: OutputDtype = Field("auto", description="Type in which the model runs; auto is the stored one.")
    device: str = Field("auto", description="Device of the computation: auto, cpu, cuda, cuda:1, mps.")


class BenchRequest(ComparisonRequest):
    """What ``transmla bench`` is asked."""

    converted: tuple[str, ...] = Field(
        (), description="Converted models: folders or hub ids; each runs as stock does and with absorbed decoding."
    )
    contexts: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(_split_at_commas)] = Field(
        (512, 1024, 2048),
        min_length=1,
        description="Context lengths, in tokens: prompt and new tokens together. Repeat, or separate by commas.",
    )
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split_at_commas)] = Field(
        (1,), min_length=1, description="Sequences at once. Repeat, or separate by commas."
    )
    num_new_tokens: int = Field(32, ge=1, description="Tokens decoded one after the other; they end the context.")
    num_rounds: int = Field(3, ge=1, description="Timed runs of each, after one that warms up and measures memory.")
    seed: int = Field(0, ge=0, description="Seed of the random prompts.")
    dtype: OutputDtype = Field("auto", description="Type in which all models run; auto is the source's stored one.")
    device: str = Field("auto", description="Device of the computation: auto, cpu, cuda, cuda:1, mps.")


class FinetuneRequest(Request):
    """What ``transmla finetune`` is asked; what belongs to the training is called as in ``TrainingArguments``."""

    checkpoint: str = Field(description="A converted model, or for comparison any other: folder or hub id.")
    output_dir: Path = Field(description="Folder to create; it appears only when the training is complete.")

    dataset: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        min_length=1,
        description="Text, JSONL or parquet file, or hub data set name[:config[:split]]: text, or conversations in a "
        "column messages; repeat to mix several.",
    )
    eval_dataset: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="Held-out data of the same kinds; by default the start of each --dataset is held out."
    )
    text_column: str | None = Field(
        None, description="Column that holds the text, or the messages; found by itself when there is one."
    )
    window: int = Field(512, ge=8, description="Tokens per sequence; several documents share one, and see only theirs.")
    num_eval_windows: int = Field(32, ge=1, description="Sequences that are held out.")
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
    attention_weight: float = Field(
        0.0, ge=0, description="Weight of the relative error of each layer's attention output, besides."
    )

    train: Train = Field(
        "attention",
        description="What is trained. attention: its projections; all: every weight; lora: low-rank changes of the "
        "attention's projections, merged into what is saved (needs peft).",
    )
    latent_norm: Literal["keep", "live"] = Field(
        "keep",
        description="live: switch the latent norm on, fitted to the data and trained, for one latent number, so that "
        "the weights survive 8-bit blocks everywhere.",
    )
    lora_rank: int = Field(32, ge=1, description="Rank of --train lora.")
    lora_alpha: int = Field(64, gt=0, description="Scale of --train lora, as a multiple of 1/rank.")

    learning_rate: float = Field(2e-4, gt=0, description="Largest learning rate.")
    lr_scheduler_type: str = Field("cosine", description="How it falls.")
    warmup_steps: float = Field(0.02, ge=0, description="Steps, or below 1 the share of all steps, in which it rises.")
    weight_decay: float = Field(0.0, ge=0, description="Decay of trained matrices.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients that are longer are shortened.")
    optim: str = Field("adamw_torch_fused", description="Optimiser, by the name that Trainer has for it.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=0, description="Steps of the optimiser, instead of passes.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Sequences on each device at once.")
    per_device_eval_batch_size: int = Field(8, ge=1, description="The same when the held-out ones are measured.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches for one step of the optimiser.")
    gradient_checkpointing: bool = Field(
        False, description="Keep the inputs of the layers only, and compute the rest again: less memory, more time."
    )
    bf16: bool | None = Field(None, description="Products in bfloat16; by default on GPUs that have it.")
    eval_steps: int = Field(100, ge=1, description="Measure the held-out sequences and save every so many steps.")
    logging_steps: int = Field(10, ge=1, description="Log the loss every so many steps.")
    save_total_limit: int = Field(1, ge=1, description="Newest checkpoints to keep, besides the best.")
    seed: int = Field(0, ge=0, description="Seed of the order of the data.")
    report_to: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="Where Trainer logs to as well: tensorboard, wandb, and others; repeat for several."
    )
    training_arguments: dict[str, Any] = Field(
        default_factory=dict, description="Further TrainingArguments of Transformers; in a recipe only."
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto is a GPU where there is one.")
    max_shard_size: str = Field("5GB", description="Largest size of one weight file.")
