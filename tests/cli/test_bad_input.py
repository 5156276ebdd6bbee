"""Whatever is wrong: one sentence on stderr, the right exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import tiny_checkpoint
from transmla.convert import run as conversion

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
HALF = ("--kv-ratio", "0.5")
FEW = ("--num-windows", "4", "--num-heldout-windows", "2", "--window", "32")


@pytest.fixture
def source(tmp_path):
    return tiny_checkpoint(tmp_path / "source", shards=2)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.fixture
def refuses(cli, tmp_path):
    """Run a command that must fail, and check everything about the failure but the reason."""

    def refuses(code, message, *arguments):
        before = tree(tmp_path)
        result = cli(*arguments)
        assert result.exit_code == code, result.output
        assert re.search(message, result.stderr), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith("Interrupted." if code == INTERRUPTED else "Error: ")
        assert "Traceback" not in result.stderr
        assert "not expected" not in result.stderr
        assert result.stdout == ""
        assert tree(tmp_path) == before

    return refuses


@pytest.fixture
def convert_refuses(refuses, source, output, calibration_text):
    """Add the arguments that are right, but for those that a test gives."""

    def convert_refuses(code, message, *flags, calibration=calibration_text, sizes=HALF):
        text = () if calibration is None else ("--calibration", calibration)
        refuses(code, message, "convert", source, output, *sizes, *text, *FEW, "-q", *flags)

    return convert_refuses


def change_config(source: Path, **changes):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def change_shard(source: Path, number: int, change):
    path = source / f"model-{number:05d}-of-00002.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


class TestSource:
    def test_no_such_folder(self, refuses, tmp_path, output):
        message = r"There is no folder .*absent, and it is not a hub id such as org/name\."
        refuses(FAILURE, message, "convert", tmp_path / "absent", output, "--exact")
        refuses(FAILURE, message, "inspect", tmp_path / "absent")

    @pytest.mark.parametrize("command", ["convert", "inspect"])
    def test_a_folder_that_is_no_model(self, refuses, tmp_path, output, command):
        (tmp_path / "papers").mkdir()
        arguments = [output, "--exact"] if command == "convert" else []
        refuses(
            FAILURE, "papers is not a model folder: it has no config.json", command, tmp_path / "papers", *arguments
        )

    def test_pickled_weights_only(self, convert_refuses, source):
        for path in source.glob("*.safetensors*"):
            path.unlink()
        (source / "pytorch_model.bin").write_bytes(b"\x80")
        convert_refuses(FAILURE, "has no safetensors weights. Pickled ones .* are refused")

    def test_config_that_is_not_json(self, convert_refuses, source):
        (source / "config.json").write_text("{")
        convert_refuses(FAILURE, "config.json is not valid JSON")

    @pytest.mark.parametrize("command", ["convert", "inspect"])
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"model_type": "t5"},
                r"'t5' in .* is not supported; supported: llama, mimo, ministral, mistral",
            ),
            ({"mlp_bias": True}, r"no biases in its MLP \(config.json: mlp_bias = True\)"),
            ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "RoPE type 'proportional'"),
            ({"num_key_value_heads": 4}, "6 attention heads cannot be shared out among 4 key/value heads"),
            (
                {"hidden_size": 54},
                r"has the shape \[.*48\]; config.json needs the shape \[.*54\]\. \d+ more do not fit",
            ),
        ],
    )
    def test_models_that_cannot_be_converted(self, refuses, source, output, command, changes, message):
        change_config(source, **changes)
        refuses(FAILURE, message, command, source, *([output, "--exact"] if command == "convert" else []))

    def test_sliding_window(self, refuses, tmp_path, output):
        source = tiny_checkpoint(tmp_path / "source", family="mistral", sliding_window=64)
        message = r"DeepSeek-V3 has no sliding-window attention \(config.json: sliding_window = 64\)"
        refuses(FAILURE, message, "convert", source, output, "--exact")

    def test_missing_shard(self, convert_refuses, source):
        (source / "model-00002-of-00002.safetensors").unlink()
        convert_refuses(FAILURE, "has no file model-00002-of-00002.safetensors; check the name, or download")

    def test_truncated_shard(self, convert_refuses, source):
        path = source / "model-00001-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        convert_refuses(FAILURE, r"model-00001-of-00002.safetensors is truncated: \d+ bytes, .* Download it again")

    def test_tensor_of_a_wrong_shape(self, convert_refuses, source):
        change_shard(source, 2, lambda tensors: tensors.update({"model.norm.weight": torch.ones(47)}))
        convert_refuses(FAILURE, r"model.norm.weight has the shape \[47\]; config.json needs the shape \[48\]")

    def test_tensor_that_is_absent(self, convert_refuses, source):
        index = json.loads((source / "model.safetensors.index.json").read_text())
        del index["weight_map"]["model.norm.weight"]
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        change_shard(source, 2, lambda tensors: tensors.pop("model.norm.weight"))
        convert_refuses(FAILURE, r"model.norm.weight is absent; config.json needs the shape \[48\]")

    @pytest.mark.parametrize("name", ["layers.0.self_attn.k_proj", "layers.1.mlp.up_proj", "embed_tokens", "norm"])
    @pytest.mark.parametrize("exact", [True, False])
    def test_weights_that_are_no_numbers(self, refuses, source, output, calibration_text, exact, name):
        """Whenever they are met: the layers before are finished work, but of a source that has to change."""

        def spoil(tensors):
            if f"model.{name}.weight" in tensors:
                tensors[f"model.{name}.weight"].view(-1)[3] = float("nan")

        for number in (1, 2):
            change_shard(source, number, spoil)
        flags = ("--exact",) if exact else (*HALF, *FEW, "--calibration", calibration_text)
        message = f"Tensor model.{name}.weight holds values that are NaN or infinite; finite weights are needed"
        refuses(FAILURE, message, "convert", source, output, *flags, "-q")

    def test_no_tokenizer(self, convert_refuses, source):
        for path in source.glob("tokenizer*"):
            path.unlink()
        convert_refuses(FAILURE, "The tokenizer of .*source cannot be loaded: ")

    def test_tokenizer_of_another_model(self, convert_refuses, source, calibration_text):
        small = tiny_checkpoint(source.with_name("small"), vocab_size=300)
        for path in small.glob("*token*"):
            path.unlink()
        for path in source.glob("*token*"):
            (small / path.name).write_bytes(path.read_bytes())
        for path in source.iterdir():
            path.unlink()
        for path in small.iterdir():
            (source / path.name).write_bytes(path.read_bytes())
        convert_refuses(FAILURE, r"The tokenizer gives token 3\d\d, but the model has only 300 embeddings")


class TestSizes:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ((), r"sizes are missing: pass --kv-ratio 0\.5, or pass --exact without --calibration\."),
            ((*HALF, "--kv-lora-rank", "8", "--qk-rope-head-dim", "4"), "more than one way .*: drop --kv-ratio, or"),
            (("--kv-lora-rank", "8"), "--kv-lora-rank and --qk-rope-head-dim belong together"),
            (("--kv-lora-rank", "0", "--qk-rope-head-dim", "4"), r"--kv-lora-rank: .* \(found 0\)"),
            (("--kv-lora-rank", "8", "--qk-rope-head-dim", "5"), "--qk-rope-head-dim 5 does not fit 2 heads of 16"),
            (("--kv-lora-rank", "60", "--qk-rope-head-dim", "8"), r"60 \+ 8 is out of range"),
            (("--kv-ratio", "1.5"), r"--kv-ratio: .* \(found 1.5\)"),
            (("--kv-ratio", "0.01"), "--kv-ratio 0.01 leaves 0 of 64 numbers per token, too few"),
            ((*HALF, "--q-lora-rank", "49"), r"out of range \(the hidden size is 48\): pass --q-lora-rank 48\."),
            ((*HALF, "--freq-fold", "3"), "--freq-fold 3 does not share 4 slots .* among 8 .*: pass --freq-fold 2, or"),
            ((*HALF, "--engine", "tensorrt"), r"--engine: .* \(found 'tensorrt'\)"),
            ((*HALF, "--engine", "vllm"), r"smallest cache for vllm is 256 \+ 64, more than the source's 64"),
            ((*HALF, "--engine", "mlx", "--profile", "quantizable"), "MLX .* --profile quantizable: pass --profile po"),
            ((*HALF, "--method", "magic"), "--method magic is unknown: pass one of fitted, rorope, exact"),
        ],
    )
    def test_refusals(self, convert_refuses, sizes, message):
        convert_refuses(USAGE, message, sizes=sizes)

    def test_exact_fits_nothing(self, convert_refuses):
        convert_refuses(USAGE, "--exact fits nothing: drop --calibration", sizes=("--exact",))
        for flag in ("--q-lora-rank", "--freq-fold", "--repeats"):
            message = f"--exact fits nothing: drop {flag}"
            convert_refuses(USAGE, message, sizes=("--exact", flag, "4"), calibration=None)

    def test_exact_for_an_engine_without_a_free_grid(self, convert_refuses):
        message = "llama.cpp cannot give every rotary slot a frequency of its own, as --exact must"
        convert_refuses(USAGE, message, sizes=("--exact", "--engine", "llama.cpp"), calibration=None)

    def test_rorope_of_scaled_rope(self, convert_refuses, source):
        change_config(source, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
        message = "--method rorope needs plain RoPE, found type 'linear'; .* pass --method fitted"
        convert_refuses(USAGE, message, sizes=("--kv-ratio", "0.5", "--method", "rorope"))


class TestText:
    def test_flag_is_missing(self, convert_refuses):
        convert_refuses(USAGE, "text is missing.*: pass --calibration FILE, or pass .* none", calibration=None)

    def test_no_such_file(self, convert_refuses, tmp_path):
        convert_refuses(FAILURE, r"There is no file .*absent.txt", calibration=tmp_path / "absent.txt")

    def test_too_short(self, convert_refuses, tmp_path):
        (tmp_path / "short.txt").write_text("A mill stood where the river left the hills.")
        message = (
            r"text has \d+ tokens \(0 windows of 32\); 6 windows are needed: pass more text or lower --num-windows"
        )
        convert_refuses(FAILURE, message, calibration=tmp_path / "short.txt")

    def test_empty(self, convert_refuses, tmp_path):
        (tmp_path / "empty.txt").write_text("")
        convert_refuses(FAILURE, "empty.txt holds no text", calibration=tmp_path / "empty.txt")

    @pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe\x00", "is not UTF-8 text"), (b"a\0b", "zero bytes")])
    def test_binary(self, convert_refuses, tmp_path, content, message):
        (tmp_path / "binary.txt").write_bytes(content)
        convert_refuses(FAILURE, message, calibration=tmp_path / "binary.txt")

    def test_a_folder(self, convert_refuses, tmp_path):
        (tmp_path / "texts").mkdir()
        convert_refuses(FAILURE, "texts is a folder: pass a file of it, text", calibration=tmp_path / "texts")

    def test_window_beyond_the_context(self, convert_refuses):
        convert_refuses(FAILURE, "--window 513 is longer than the model's context of 512", "--window", "513")


class TestRecipe:
    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            ("kv_ration: 0.5", r"--kv-ration: Extra inputs are not permitted \(found 0.5\)"),
            ("freq_fold: many", r"--freq-fold: Input should be a valid integer.* \(found 'many'\)"),
            ("seed: -1\nbatch_size: 0", r"--batch-size: .* \(found 0\); --seed: .* \(found -1\)"),
            ("- kv_ratio", r"recipe.yaml must be a mapping of keys to values, found list"),
            ("a: [1", r"recipe.yaml is not valid YAML: "),
            ("", r"recipe.yaml must be a mapping of keys to values, found NoneType"),
        ],
    )
    def test_refusals(self, convert_refuses, tmp_path, recipe, message):
        (tmp_path / "recipe.yaml").write_text(recipe)
        convert_refuses(USAGE, message, "--config", tmp_path / "recipe.yaml")

    def test_no_such_recipe(self, convert_refuses, tmp_path):
        convert_refuses(USAGE, "The recipe .*absent.yaml cannot be read", "--config", tmp_path / "absent.yaml")

    def test_arguments_that_are_nowhere(self, refuses):
        refuses(USAGE, r"MODEL is missing; OUTPUT_DIR is missing\.", "convert")
        refuses(USAGE, r"MODEL is missing\.", "inspect")


class TestMachine:
    @pytest.mark.parametrize(
        ("flags", "code", "message"),
        [
            (("--dtype", "int8"), USAGE, r"--dtype: .* \(found 'int8'\)"),
            (
                ("--dtype", "float16"),
                USAGE,
                "float16 cannot hold: pass --dtype bfloat16, or pass --dtype float32, or pass --profile quant",
            ),
            (("--compute-dtype", "float16"), USAGE, r"--compute-dtype: .* \(found 'float16'\)"),
            (("--max-shard-size", "5 bananas"), USAGE, "--max-shard-size '5 bananas' is not a size; write 5GB"),
            (("--max-shard-size", "0"), USAGE, "--max-shard-size '0' is not a size"),
            (("--device", "abacus"), USAGE, "The device 'abacus' cannot be used here: pass --device auto, cpu"),
            (("--revision", "main"), USAGE, "--revision applies to models on the hub"),
            (("--gguf-file", "model.gguf"), FAILURE, "has no file model.gguf"),
        ],
    )
    def test_refusals(self, convert_refuses, flags, code, message):
        convert_refuses(code, message, *flags)

    def test_output_that_is_not_empty(self, convert_refuses, output):
        output.mkdir()
        (output / "thesis.tex").write_text("")
        convert_refuses(FAILURE, "out is not empty; choose another folder, or replace it with --overwrite")
        convert_refuses(FAILURE, "does not hold a model, so --overwrite will not delete it", "--overwrite")

    def test_output_inside_the_source(self, refuses, source):
        refuses(FAILURE, "and the source .* overlap; choose a folder", "convert", source, source / "mla", "--exact")

    def test_a_full_disk_is_noticed_before_the_work(self, convert_refuses, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda folder: Mock(free=1000))
        monkeypatch.setattr(conversion, "calibration_windows", Mock(side_effect=AssertionError("too late")))
        convert_refuses(FAILURE, r"needs [\d,]+ bytes, but its disk has only 1,000 free")

    def test_a_quota_is_noticed_when_the_files_are_made(self, convert_refuses, monkeypatch):
        def refuse(descriptor, offset, length):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        monkeypatch.setattr(conversion, "convert_layers", Mock(side_effect=AssertionError("too late")))
        convert_refuses(FAILURE, r"The disk of .* is full: the weights need [\d,]+ bytes in all .* Free some space")

    def test_interrupted_before_the_first_layer_is_done(self, convert_refuses, monkeypatch):
        monkeypatch.setattr(conversion, "convert_layers", Mock(side_effect=KeyboardInterrupt))
        convert_refuses(INTERRUPTED, r"^Interrupted\.$")

    def test_two_runs_of_one_output(self, cli, source, output):
        with conversion.Staging(output, identity="another process"):
            result = cli("convert", source, output, "--exact", "-q")
        assert result.exit_code == FAILURE
        assert re.search("Another process is writing .*out; wait for it or choose another", result.stderr)
        assert not output.exists()


def test_flags_that_cannot_be_read(cli):
    """The parser's own messages are framed, but go to stderr with the same exit code."""
    for arguments in (["convert", "m", "o", "--window", "many"], ["convert", "--frequency", "1"], ["conjure"]):
        result = cli(*arguments)
        assert result.exit_code == USAGE
        assert result.stdout == ""
        assert "Traceback" not in result.stderr


def test_a_bug_is_one_sentence_and_keeps_its_traceback_for_debugging(cli, source, output, monkeypatch):
    monkeypatch.setattr(conversion, "plan_conversion", Mock(side_effect=ZeroDivisionError("by\nzero")))
    result = cli("convert", source, output, "--exact")
    assert result.exit_code == FAILURE
    assert result.stderr == "Error: ZeroDivisionError: by zero (not expected; TRANSMLA_DEBUG=1 shows where)\n"
    monkeypatch.setenv("TRANSMLA_DEBUG", "1")
    assert isinstance(cli("convert", source, output, "--exact").exception, ZeroDivisionError)


_INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore it.
from transmla.checkpoint.journal import Journal
append = Journal.append
def interrupted(self, entry):
    append(self, entry)
    os.kill(os.getpid(), signal.SIGINT)
Journal.append = interrupted
from transmla.cli.app import main
main()
"""


def test_a_real_process(source, output, tmp_path):
    """Ctrl-C half-way, from outside: a sentence, 130, no traceback, no output."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, "convert", str(source), str(output), "--exact", "-q"],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (INTERRUPTED, "")
    assert done.stderr == "Interrupted. Continue with --resume.\n"
    assert not output.exists()
    done = subprocess.run(
        [sys.executable, "-m", "transmla", "inspect", str(tmp_path / "absent")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (FAILURE, "")
    assert re.fullmatch(r"Error: There is no folder .*absent, and it is not a hub id such as org/name\.\n", done.stderr)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--heal-steps", "3", "--method", "rorope"), "--heal-steps needs --method fitted and a text"),
        (("--calibration", "none"), "--calibration none means no text at all"),
        (("--heal-steps", "-1"), "--heal-steps: Input should be greater than or equal to 0"),
    ],
)
def test_healing_and_mixing_need_text(convert_refuses, flags, message):
    convert_refuses(USAGE, message, *flags)
