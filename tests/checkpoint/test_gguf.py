import json
import subprocess
import sys
from subprocess import PIPE

import numpy as np
import pytest
import torch

from transmla.checkpoint.gguf import stage_gguf
from transmla.checkpoint.publish import Staging
from transmla.checkpoint.reader import CheckpointReader
from transmla.errors import CheckpointError

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 32, 4, 2, 8, 64, 2
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefgh", "▁", "ab", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]


def write_tiny_llama(path, *, skip=(), say=lambda writer: None):
    writer = gguf.GGUFWriter(path, "llama")
    say(writer)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(number) for number in range(len(TOKENS))])
    writer.add_token_types([2, 3, 3] + [1] * (len(TOKENS) - 3 - 256) + [6] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "output": (len(TOKENS), HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (MLP, HIDDEN),
            f"blk.{layer}.ffn_up": (MLP, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, MLP),
        }
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name not in skip:
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSMLA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def test_staged_once_and_published_whole(folder, tmp_path, monkeypatch, capfd):
    tensors = write_tiny_llama(folder / "tiny.gguf")
    (folder / "LICENSE").write_text("free")
    staged = stage_gguf(folder, "tiny.gguf")
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in (tmp_path / "cache" / "gguf").iterdir()] == [staged.name]
    assert staged.name.startswith("tiny-")
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= {path.name for path in staged.iterdir()}

    reader = CheckpointReader(staged)
    assert {header.dtype for header in reader.headers.values()} == {torch.float32}
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(reader.read([up])[up], torch.from_numpy(tensors["blk.1.ffn_up"]))
    config = json.loads((staged / "config.json").read_text())
    assert (config["rms_norm_eps"], config["num_key_value_heads"]) == (1e-5, KV_HEADS)

    monkeypatch.setattr("transmla.checkpoint.gguf._dequantize", lambda *args: pytest.fail("staged twice"))
    assert stage_gguf(folder, "tiny.gguf") == staged


def test_of_two_processes_one_makes_it_and_both_have_it(folder, tmp_path):
    write_tiny_llama(folder / "tiny.gguf")
    code = f"""
from pathlib import Path
from transmla.checkpoint.gguf import stage_gguf
print(stage_gguf(Path({str(folder)!r}), "tiny.gguf"))
"""
    first, second = (subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE, text=True) for _ in "ab")
    said = [process.communicate(timeout=300) for process in (first, second)]
    [staged] = (tmp_path / "cache" / "gguf").iterdir()
    assert said == [(f"{staged}\n", "")] * 2


def test_a_process_waits_for_the_one_that_makes_it(folder, tmp_path, monkeypatch):
    write_tiny_llama(folder / "tiny.gguf")
    staged = stage_gguf(folder, "tiny.gguf")
    made = staged.rename(tmp_path / "made")
    waits = []

    def publish(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            made.rename(staged)

    monkeypatch.setattr("time.sleep", publish)
    monkeypatch.setattr("transmla.checkpoint.gguf._dequantize", lambda *args: pytest.fail("staged twice"))
    with Staging(staged, identity="another process"):
        assert stage_gguf(folder, "tiny.gguf") == staged
    assert len(waits) == 3


def test_a_process_that_comes_a_moment_late_takes_what_is_there(folder, tmp_path, monkeypatch):
    write_tiny_llama(folder / "tiny.gguf")
    staged = stage_gguf(folder, "tiny.gguf")
    made = staged.rename(tmp_path / "made")

    def published_meanwhile(*args, **kwargs):
        made.rename(staged)
        return Staging(*args, **kwargs)

    monkeypatch.setattr("transmla.checkpoint.gguf.Staging", published_meanwhile)
    monkeypatch.setattr("transmla.checkpoint.gguf._dequantize", lambda *args: pytest.fail("staged twice"))
    assert stage_gguf(folder, "tiny.gguf") == staged
    assert list((tmp_path / "cache" / "gguf").iterdir()) == [staged]


def test_a_failure_leaves_nothing(folder, tmp_path, monkeypatch):
    write_tiny_llama(folder / "tiny.gguf")

    def fail(path, output_dir):
        (output_dir / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("transmla.checkpoint.gguf._dequantize", fail)
    with pytest.raises(KeyboardInterrupt):
        stage_gguf(folder, "tiny.gguf")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_a_part_of_a_model_is_refused(folder):
    write_tiny_llama(folder / "part.gguf", skip=("blk.1.ffn_up",))
    with pytest.raises(
        CheckpointError, match=r"part\.gguf lacks 1 tensors of the model, such as model\.layers\.1\.mlp\.up"
    ):
        stage_gguf(folder, "part.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.gguf", r"has no file absent\.gguf; check the name"), ("../m.gguf", "only plain names inside the folder")],
)
def test_names(folder, name, message):
    with pytest.raises(CheckpointError, match=message):
        stage_gguf(folder, name)


def test_a_file_of_another_kind(folder):
    (folder / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"m\.gguf is not a GGUF file"):
        stage_gguf(folder, "m.gguf")


def test_a_damaged_file(folder):
    (folder / "m.gguf").write_bytes(b"GGUF" + b"\x00" * 40)
    with pytest.raises(CheckpointError, match=r"transformers cannot read .*m\.gguf: "):
        stage_gguf(folder, "m.gguf")


def test_without_the_gguf_package(folder, monkeypatch):
    (folder / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the gguf package: pip install 'transmla\[gguf\]'"):
        stage_gguf(folder, "m.gguf")


@pytest.mark.parametrize(
    ("say", "words"),
    [
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            r"says llama\.rope\.scaling\.type = yarn",
        ),
        (
            lambda w: w.add_rope_scaling_factor(4.0),
            r"says llama\.rope\.scaling\.factor = 4\.0, which",
        ),
        (lambda w: w.add_causal_attention(False), r"says llama\.attention\.causal = False"),
        (lambda w: w.add_logit_scale(0.5), r"says llama\.logit_scale = 0\.5"),
        (lambda w: w.add_pooling_type(gguf.PoolingType.LAST), "of an embedder or a reranker"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), r"holds rope_freqs\.weight, the freq"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32)), "holds 1 biases, of which .* has 0"),
        (lambda w: w.add_type("adapter"), "is an adapter to another model"),
    ],
)
def test_what_transformers_passes_over_is_refused(folder, tmp_path, say, words):
    write_tiny_llama(folder / "tiny.gguf", say=say)
    with pytest.raises(CheckpointError, match=words):
        stage_gguf(folder, "tiny.gguf")
    assert not any((tmp_path / "cache" / "gguf").iterdir())


def test_what_changes_nothing_passes(folder):
    def say(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)
        writer.add_causal_attention(True)
        writer.add_pooling_type(gguf.PoolingType.NONE)

    write_tiny_llama(folder / "tiny.gguf", say=say)
    assert stage_gguf(folder, "tiny.gguf").is_dir()
