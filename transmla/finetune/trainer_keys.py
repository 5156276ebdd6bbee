"""What becomes of each key of Transformers' ``TrainingArguments`` in a recipe's ``training_arguments``.

Four kinds: keys that the training heeds; keys that are flags here; keys that transmla sets itself; and keys that would
do nothing, or harm. Whatever is in none of them is refused: a key that a newer release of Transformers has brought may
do anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from transmla.errors import UsageError

HEEDED = {
    # The optimizer and its learning rate.
    "lr_scheduler_kwargs",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "neftune_noise_alpha",
    # Numbers and memory.
    "tf32",
    "torch_empty_cache_steps",
    "full_determinism",
    "debug",
    # What is logged and measured.
    "logging_strategy",
    "logging_first_step",
    "logging_nan_inf_filter",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "run_name",
    "project",
    "eval_delay",
    # How data are loaded.
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    # How processes speak to each other.
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "ddp_backend",
    "ddp_timeout",
    "deepspeed",
}

FLAGS = {
    "output_dir": "the argument OUTPUT_DIR",
    "learning_rate": "--learning-rate",
    "lr_scheduler_type": "--lr-scheduler-type",
    "warmup_steps": "--warmup-steps",
    "weight_decay": "--weight-decay",
    "max_grad_norm": "--max-grad-norm",
    "optim": "--optim",
    "num_train_epochs": "--num-train-epochs",
    "max_steps": "--max-steps",
    "per_device_train_batch_size": "--per-device-train-batch-size",
    "per_device_eval_batch_size": "--per-device-eval-batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation-steps",
    "gradient_checkpointing": "--gradient-checkpointing",
    "activation_checkpointing": "--gradient-checkpointing",
    "bf16": "--bf16",
    "use_cpu": "--device cpu",
    "eval_steps": "--eval-steps",
    "save_steps": "--eval-steps",
    "save_total_limit": "--save-total-limit",
    "logging_steps": "--logging-steps",
    "report_to": "--report-to",
    "seed": "--seed",
    "data_seed": "--seed",
    "resume_from_checkpoint": "--resume",
    "push_to_hub": "--push-to-hub",
    "hub_model_id": "--push-to-hub",
    "hub_token": "--token",
}

OWN = {
    "do_train",
    "do_eval",
    "eval_strategy",
    "eval_on_start",
    "save_strategy",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "remove_unused_columns",
    "include_num_input_tokens_seen",
    "disable_tqdm",
    "dataloader_pin_memory",
}

_NOTHING = "has no effect on this training"
_MEASURED = f"{_NOTHING}: what is held out is measured by transmla itself"
_WRITTEN = f"{_NOTHING}: checkpoints are written by transmla itself, with all that --resume needs"
_EQUALLY_LONG = f"{_NOTHING}: all sequences are of one length, and come in an order of transmla's own"
_ONCE = "could break the rule that every sequence comes once a pass"
_UPLOAD = "would send something out: --push-to-hub uploads what is finished, and nothing else does"
_SHARDING = (
    "is for accelerate to say, before models are loaded: accelerate launch --config_file configs/accelerate/fsdp.yaml"
)
_COMPILED = "would fail at the first checkpoint: a compiled model has other names for its weights"
_LIGER = "would put another loss in the place of the one that a teacher needs"

REFUSED = {
    "label_smoothing_factor": f"{_NOTHING}, whose loss is transmla's own: see --ce-weight and --temperature",
    "do_predict": _NOTHING,
    "use_cache": _NOTHING,
    "label_names": _NOTHING,
    "activation_checkpointing_kwargs": _NOTHING,
    "gradient_checkpointing_kwargs": _NOTHING,
    "restore_callback_states_from_checkpoint": _NOTHING,
    "skip_memory_metrics": f"{_NOTHING}: --dry-run tells what memory it takes",
    "local_rank": f"{_NOTHING}: accelerate launch numbers the processes",
    "prediction_loss_only": _MEASURED,
    "include_for_metrics": _MEASURED,
    "batch_eval_metrics": _MEASURED,
    "bf16_full_eval": _MEASURED,
    "fp16_full_eval": _MEASURED,
    "eval_accumulation_steps": _MEASURED,
    "eval_do_concat_batches": _MEASURED,
    "eval_use_gather_object": _MEASURED,
    "save_only_model": _WRITTEN,
    "save_on_each_node": _WRITTEN,
    "enable_jit_checkpoint": _WRITTEN,
    "train_sampling_strategy": _EQUALLY_LONG,
    "length_column_name": _EQUALLY_LONG,
    "dataloader_drop_last": _ONCE,
    "dataloader_in_order": _ONCE,
    "ignore_data_skip": _ONCE,
    "auto_find_batch_size": _ONCE,
    "accelerator_config": _ONCE,
    "hub_strategy": _UPLOAD,
    "hub_revision": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "trackio_space_id": _UPLOAD,
    "trackio_bucket_id": _UPLOAD,
    "trackio_static_space_id": _UPLOAD,
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "parallelism_config": _SHARDING,
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "fp16": "would stop at its first overflow, by which it finds its scale: the half precision here is --bf16",
    "optim_target_modules": "is for optimizers with low-rank gradients, which have not been tried here",
    "average_tokens_across_devices": "would weight the tokens of each process differently",
}


def check_keys(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse what is not heeded; what ``TrainingArguments`` itself does not know is left to it.

    Args:
        given: keys of ``training_arguments``.
        known: the fields of the installed ``TrainingArguments``.

    Raises:
        UsageError: one of them would do nothing, do harm, or is another's to say.
    """
    problems = [f"{key} {_reason(key)}" for key in given if key in known and key not in HEEDED]
    if problems:
        raise UsageError(f"training_arguments: {'; '.join(problems)}.")


def _reason(key: str) -> str:
    if key in FLAGS:
        return f"is {FLAGS[key]} here"
    if key in OWN:
        return "is set by transmla itself"
    return REFUSED.get(key, "is a key of a release of Transformers that transmla does not know yet")
