"""A plan in figures, for people and programs."""

from transmla.records import Record


class Prediction(Record):
    """What a split of the cache is predicted to cost.

    Attributes:
        key_error: root of the mean over the layers of ‖error of the attention output‖² / ‖residual stream‖², as far as
            it comes from the keys; ``None`` where an older version wrote it.
        value_error: the same as far as it comes from the values.
        error: both together, the keys with less weight (:data:`~transmla.convert.predict.KEY_WEIGHT`); at par where an
            older version wrote it.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    key_error: float | None = None
    value_error: float | None = None
    error: float


class PlanSummary(Record):
    """What is about to happen, for people and programs.

    Attributes:
        share: numbers that will be cached, as a share of the source's.
        source_kv_bytes_per_token: in the type that the source is stored in.
        kv_bytes_per_token: in the type of the output.
        peak_memory_bytes: of the whole process; ``library_memory_bytes`` of them it takes whatever it converts.
        left_over: names of tensors that are not converted.
        warnings: what may not be as it was meant, a sentence each.
        unread: keys of the source's config.json that transformers does not read, and the result does not have.
    """

    model: str
    family: str
    output_dir: str
    method: str
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None
    dtype: str
    source_dtype: str
    source_numbers_per_token_layer: int
    numbers_per_token_layer: int
    share: float
    source_kv_bytes_per_token: int
    kv_bytes_per_token: int
    num_layers: int
    num_shards: int
    output_bytes: int
    peak_memory_bytes: int
    library_memory_bytes: int
    engines: tuple[str, ...]
    predictions: tuple[Prediction, ...] = ()
    left_over: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
