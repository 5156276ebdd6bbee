"""The model card: what this checkpoint is, where it comes from, what was measured."""

import yaml

from transmla.convert.plan import ConversionPlan
from transmla.convert.report import ConversionReport

_CARD = """---
{metadata}---

# {title}

{base} with its grouped-query attention rewritten as Multi-head Latent Attention by transmla {version}. It is a native
DeepSeek-V3 checkpoint: no remote code.

| | source | this model |
|---|---|---|
| KV cache, numbers per token and layer | {source_numbers} | {numbers} ({rank} latent + {rope} rotary) |
| KV cache, bytes per token ({dtype}) | {source_bytes:,} | {bytes:,} ({share:.0%}) |

Method: `{method}`. {fit} Engines whose rules these sizes meet: {engines}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```

The recipe is in `transmla_recipe.yaml`, the errors of every layer are in `transmla_report.json`.
"""


def model_card(plan: ConversionPlan, report: ConversionReport) -> str:
    """Write the card as Markdown with the hub's metadata."""
    summary = report.plan
    # A path of the machine that converted means nothing to others, so a folder is called by its name.
    local = plan.request.gguf_file or plan.source.folder.resolve().name
    base = plan.source.repo_id or local
    metadata = {
        **({"base_model": base} if plan.source.repo_id else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["transmla", "mla", "deepseek_v3"],
    }
    return _CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        title=plan.request.output_dir.resolve().name,
        base=base,
        version=report.versions.transmla,
        source_numbers=summary.source_numbers_per_token_layer,
        numbers=summary.numbers_per_token_layer,
        rank=summary.kv_lora_rank,
        rope=summary.qk_rope_head_dim,
        dtype=" → ".join(dict.fromkeys((summary.source_dtype, summary.dtype))),
        source_bytes=summary.source_kv_bytes_per_token,
        bytes=summary.kv_bytes_per_token,
        share=summary.kv_bytes_per_token / summary.source_kv_bytes_per_token,
        method=summary.method,
        fit=_fit(report, exact=plan.method.exact),
        engines=", ".join(summary.engines) or "none",
    )


def _fit(report: ConversionReport, *, exact: bool) -> str:
    calibration, error = report.calibration, report.mean_relative_error
    if exact:
        routing = [layer.routing_error for layer in report.layers if layer.routing_error is not None]
        up_to = (
            f"the routing ({max(routing):.2g} of the experts are others, in the worst layer)" if routing else "rounding"
        )
        return f"The logits equal the source's up to {up_to}."
    if calibration is None or error is None:
        return "Converted from the weights alone, without calibration text."
    repeats = f" and {calibration.num_repeats} of repeats" if calibration.num_repeats else ""
    return (
        f"Fitted on {calibration.num_windows} windows of the text{repeats}, {calibration.window} tokens each; relative "
        f"error of the residual stream on {calibration.num_heldout_windows + calibration.num_heldout_repeats} other "
        f"windows, mean of the layers: {error:.3f}.{_healing(report)}"
    )


def _healing(report: ConversionReport) -> str:
    if report.num_healed is None:
        return ""
    layers = f"{report.num_healed} of {len(report.layers)} layers"
    return f" On windows that were kept to judge by, healing made {layers} better."
