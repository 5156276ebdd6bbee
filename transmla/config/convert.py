"""What ``transmla convert`` is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from transmla.config.inspect import MAX_POSITION_EMBEDDINGS
from transmla.config.request import BOS, Bos, ComputeDtype, OutputDtype, SourceRequest, as_tuple

Profile = Literal["portable", "quantizable"]
LatentNorm = Literal["neutral", "fitted"]
Biases = Literal["keep", "merge"]
EngineName = Literal["transformers", "vllm", "vllm-cpu", "sglang", "llama.cpp", "mlx"]


class ConvertRequest(SourceRequest):
    """What ``transmla convert`` is asked."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("model", "output_dir")

    @model_validator(mode="before")
    @classmethod
    def _exact_is_a_method(cls, values: Any) -> Any:
        """Take ``--method exact`` for ``--exact``."""
        if isinstance(values, dict) and values.get("method") == "exact":
            return {**values, "exact": True, "method": "fitted"}
        return values

    output_dir: Path = Field(description="Folder to create; it appears only when it is complete.")

    kv_lora_rank: int | None = Field(None, ge=1, description="Latent numbers cached per token and layer.")
    qk_rope_head_dim: int | None = Field(None, ge=2, description="Rotary key numbers cached per token and layer.")
    kv_ratio: float | None = Field(
        None, gt=0, le=1, description="Converted KV cache as a share of the source's; the tool picks the split."
    )
    max_position_embeddings: int | None = MAX_POSITION_EMBEDDINGS
    q_lora_rank: int | None = Field(None, ge=1, description="Rank of the query projection; full by default.")
    exact: bool = Field(False, description="Write the same model as MLA: equal logits at equal cache size.")
    engine: Annotated[tuple[EngineName, ...], BeforeValidator(as_tuple)] = Field(
        (), description=f"Engine that must load the result; repeat for several ({', '.join(get_args(EngineName))})."
    )

    method: str = Field(
        "fitted",
        description="fitted: what the cache holds and how every head reads it, by what an error does to the layer's "
        "output; rorope: the TransMLA paper's; exact: --exact.",
    )
    method_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the method, to see what its steps are worth; in a recipe only."
    )
    freq_fold: int | None = Field(
        None, ge=1, description="Neighboring frequencies that share rotary slots; chosen per layer by default."
    )

    calibration: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (),
        description="Text, JSONL or parquet file, hub data set name[:config[:split]], or none (weights only); "
        "repeat to mix several, an equal share of the windows each.",
    )
    text_column: str | None = Field(None, description="Column that holds the text; found by itself when there is one.")
    bos: Bos = BOS
    num_windows: int | None = Field(
        None,
        ge=1,
        description="Number of calibration windows to fit on: 128 by default, and with --heal-steps as many as its "
        "steps need, as far as the text has them.",
    )
    window: int = Field(256, ge=8, description="Tokens per calibration window.")
    repeats: float | None = Field(
        None,
        ge=0,
        le=4,
        description="Windows in which random words and passages of the text are said twice, as a share of the others, "
        "and added to them: what is fitted on them keeps copying. By default 0.33 for fitted, 0 for other methods.",
    )
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
        description="neutral: the engines' norm on the latent does nothing; fitted: it is a real one, fitted to the "
        "text, and the weights survive 8-bit blocks everywhere, for one latent number.",
    )
    biases: Biases = Field(
        "keep",
        description="What becomes of biases on queries, keys and values. keep: they stay, for transformers and MLX; "
        "merge: into the weights, by a functional of the input that is nearly one, for all engines.",
    )
    dtype: OutputDtype = Field("auto", description="Storage type of the written weights; auto keeps the source's.")
    compute_dtype: ComputeDtype = Field("float32", description="Type of the matrix products when layers run over text.")
    device: str = Field("auto", description="Device of the computation: auto, cpu, cuda, cuda:1, mps.")
    max_shard_size: str = Field("5GB", description="Largest size of one weight file.")
