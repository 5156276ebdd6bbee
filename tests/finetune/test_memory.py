"""The estimate of memory against what training takes, tensor by tensor."""

from __future__ import annotations

import json
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig

from tests.factory import tiny_tokenizer
from transmla.arch.skeleton import Skeleton
from transmla.bench.memory import LiveTensors
from transmla.checkpoint.shards import TensorPlan, plan_shards
from transmla.data.vocabulary import SharedTokens
from transmla.finetune.distill import loss
from transmla.finetune.distill.loss import Mix
from transmla.finetune.distill.student import Student
from transmla.finetune.distill.teacher import FullTargets, TeacherOutputs
from transmla.finetune.memory_estimate import Setting, estimate_memory
from transmla.finetune.parameters import choose_trained, take_types
from transmla.modeling import absorb

# Large enough beside the odds and ends that no estimate counts.
CONFIG = DeepseekV3Config(
    vocab_size=3000,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=5,
    first_k_dense_replace=5,
    num_attention_heads=6,
    num_key_value_heads=6,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=32,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
)
BATCH, WINDOW = 3, 200


CASES = [(*case, None) for case in product(["attention", "all", "lora"], [False, True], [False, True])]
CASES += [("attention", False, True, SharedTokens(3000, 3200))]


@pytest.mark.parametrize(("train", "bf16", "checkpointing", "shared"), CASES)
def test_the_estimate_is_near(monkeypatch, train, bf16, checkpointing, shared):
    # As large a part of the logits at once as in large models.
    monkeypatch.setattr(loss, "CPU_CHUNK_NUMBERS", 2**18)
    monkeypatch.setattr("transmla.finetune.memory_estimate.CPU_CHUNK_NUMBERS", 2**18)
    torch.manual_seed(0)
    model = absorb(DeepseekV3ForCausalLM(CONFIG))
    trained = choose_trained(model, train, lora_rank=8, lora_alpha=8)
    take_types(model, halved=bf16)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    student = Student.from_model(model, Mix(0.1)).train()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], fused=True)
    tokens = torch.randint(3000, (BATCH, WINDOW))
    teacher = torch.nn.Linear(64, shared.num_there if shared else 3000, bias=False)
    teacher_outputs = TeacherOutputs(
        FullTargets(torch.randn(BATCH * (WINDOW - 1), 64), teacher, torch.device("cpu"), shared)
    )
    with LiveTensors() as meter:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                output = student(tokens, torch.arange(WINDOW).expand(BATCH, -1), tokens, teacher_outputs)
            output["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            peak = meter.lap()
    setting = Setting(
        train, 8, BATCH, WINDOW, bf16=bf16, checkpointing=checkpointing, on_cpu=True, renormalized=shared is not None
    )
    memory = estimate_memory(CONFIG, setting)
    assert memory.num_trained == sum(student.get_parameter(name).numel() for name in trained)
    weights = memory.frozen + memory.trained
    held = sum(parameter.nbytes for parameter in student.parameters())
    assert weights == pytest.approx(held, rel=0.01)
    # Found: between 0.89 and 1.12.
    assert memory.peak - weights == pytest.approx(peak, rel=0.15)


def hollow(folder, config):
    """A checkpoint with headers and holes: nothing but its size is on the disk."""
    folder.mkdir()
    config.architectures = ["DeepseekV3ForCausalLM" if config.model_type == "deepseek_v3" else "LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = [TensorPlan(name, tuple(shape), torch.bfloat16) for name, shape in Skeleton(config).shapes.items()]
    for shard in plan_shards(tensors, max_shard_size="100GB"):
        with (folder / shard.file_name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    return folder


def test_a_dry_run_of_a_large_model_reads_headers_only(cli, tmp_path, calibration_text):
    sizes = {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 8192,
    }
    latent = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    deepseek = DeepseekV3Config(
        **sizes, **latent, v_head_dim=128, num_key_value_heads=32, first_k_dense_replace=32, rms_norm_eps=1e-6
    )
    mla = hollow(tmp_path / "mla", deepseek)
    source = hollow(tmp_path / "source", LlamaConfig(**sizes, num_key_value_heads=8))
    found = {}
    for train in ("attention", "all", "lora"):
        for checkpointing in ("--no-gradient-checkpointing", "--gradient-checkpointing"):
            result = cli(
                "finetune", mla, tmp_path / "out", "--dataset", calibration_text, "--teacher", source, "--window", 2048,
                "--num-eval-windows", 1, "--per-device-train-batch-size", 1, "--train", train, checkpointing,
                "--bf16", "--dry-run", "--json", "-q",
            )  # fmt: skip
            assert result.exit_code == 0, result.stderr
            plan = json.loads(result.stdout)
            found[train, checkpointing] = plan["memory"]
            assert plan["memory"]["teacher"] == 16_060_522_496
    # 16 GB each of student and teacher in bfloat16, and what is trained in float32, four times.
    for (train, _), memory in found.items():
        weights = 8.24e9 * 2 + (2 * memory["num_trained"])
        assert memory["frozen"] + memory["trained"] == pytest.approx(weights, rel=0.01), train
        assert memory["optimizer"] == 8 * memory["num_trained"]
    # Query, down, up and output projections, and a latent norm, which is trained only where it is a fitted one.
    layer = 4096 * 32 * 192 + 4096 * 576 + 512 * 32 * 256 + 32 * 128 * 4096 + 512
    assert found["attention", "--gradient-checkpointing"]["num_trained"] == 32 * layer
    assert list(tmp_path.glob("*out*")) == []
