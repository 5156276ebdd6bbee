"""Sources that must not pass, and some that must: every reason is the real one, and the same in inspect and convert."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.convert.models import load
from tests.convert.sources import refusal
from tests.factory import tiny_checkpoint
from transmla.checkpoint import hub
from transmla.checkpoint.reader import CheckpointReader
from transmla.checkpoint.safetensors import SINGLE_FILE
from transmla.config import ConvertRequest, InspectRequest
from transmla.convert.inspection import inspect
from transmla.convert.plan import plan_conversion
from transmla.convert.run import convert
from transmla.errors import TransMLAError

TOKENS = torch.arange(60).reshape(2, 30) * 5 % 389


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("opened") / "llama")


@pytest.fixture
def changed(llama, tmp_path):
    """Copy the checkpoint with its tensors changed by a function, and keys of its config."""

    def change(change_tensors=lambda tensors: tensors, source=llama, **keys) -> Path:
        folder = shutil.copytree(source, tmp_path / "source")
        tensors = change_tensors(load_file(folder / SINGLE_FILE))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_FILE)
        config = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def converted(folder: Path):
    """The logits of the source, as stock transformers loads it, and of its exact conversion."""
    request = ConvertRequest(model=str(folder), output_dir=folder.parent / "mla", exact=True)
    assert inspect(InspectRequest(model=str(folder))).left_over == convert(request).plan.left_over
    with torch.no_grad():
        return tuple(load(path)(TOKENS).logits for path in (folder, folder.parent / "mla"))


def renamed(pattern: str):
    return lambda tensors: {pattern.format(name): tensor for name, tensor in tensors.items()}


def without_prefix(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def without_head(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_model_is_converted_where_a_head_exists_or_is_tied(changed, tied):
    def base(tensors):
        return without_prefix(without_head(tensors) if tied else tensors)

    source, mla = converted(changed(base, tie_word_embeddings=tied, architectures=["LlamaModel"]))
    assert torch.allclose(source, mla, atol=1e-4)


def test_a_base_model_in_several_files_with_fused_weights(tmp_path):
    folder = tiny_checkpoint(tmp_path / "phi3", family="phi3", shards=2)
    weight_map = {}
    for path in folder.glob("*.safetensors"):
        tensors = without_prefix(load_file(path))
        save_file(tensors, path, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    source, mla = converted(folder)
    assert torch.allclose(source, mla, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed("_orig_mod.{}"), ["Tensor _orig_mod.", "_orig_mod. in its name", "torch.compile"]),
        (renamed("module.{}"), ["Tensor module.", "module. in its name", "DataParallel"]),
        (renamed("_fsdp_wrapped_module.{}"), ["_fsdp_wrapped_module. in its name", "FSDP"]),
        (renamed("base_model.model.{}"), ["has the prefix base_model.model.model.", "model.embed_tokens.weight"]),
        (renamed("language_model.{}"), ["has the prefix language_model.model."]),
        (renamed("transformer.{}"), ["has the prefix transformer.model."]),
        (
            lambda tensors: {name.replace("model.", "model.language_model."): t for name, t in tensors.items()},
            ["has the prefix model.language_model."],
        ),
        (
            lambda tensors: {name.replace("mlp.", "_checkpoint_wrapped_module.mlp."): t for name, t in tensors.items()},
            ["_checkpoint_wrapped_module.mlp.", "activation checkpointing"],
        ),
        (
            lambda tensors: {name.replace("q_proj.", "q_proj.base_layer."): t for name, t in tensors.items()},
            ["q_proj.base_layer.weight", "merge it with peft (merge_and_unload)"],
        ),
        (
            lambda tensors: {f"transformer.h.{index}.attn.weight": torch.ones(2) for index in range(2)},
            ["Tensor transformer.h.0.attn.weight is in a layout"],
        ),
        (
            lambda tensors: {"tok_embeddings.weight": torch.ones(2), "layers.0.attention.wq.weight": torch.ones(2)},
            ["Tensor layers.0.attention.wq.weight is in a layout"],
        ),
        (lambda tensors: {"step": torch.ones(2)}, ["hold no tensor of a decoder, but step"]),
    ],
)  # fmt: skip
def test_the_tensor_and_its_prefix_are_named(changed, change, words):
    found = refusal(changed(change))
    for word in words:
        assert word in found
    assert "of 0 layers" not in found


@pytest.mark.parametrize("base", [False, True])
def test_a_head_that_was_not_saved(changed, base):
    found = refusal(changed(lambda tensors: without_prefix(without_head(tensors)) if base else without_head(tensors)))
    assert "output head was not saved: tensor lm_head.weight is absent" in found
    assert "tie_word_embeddings = False" in found


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("score.weight", "a classifier or reward model, whose head is score.weight"),
        ("classifier.weight", "a classifier or reward model"),
        ("v_head.summary.weight", "a reward model, whose head is v_head.summary.weight"),
        ("regression_head.weight", "a reward model"),
        ("qa_outputs.weight", "a model that marks answers in a text"),
    ],
)
def test_other_heads(changed, head, words):
    found = refusal(changed(lambda tensors: {**tensors, head: torch.ones(1, 48)}))
    assert words in found


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("LlamaForSequenceClassification", "a classifier or reward model"),
        ("LlamaForTokenClassification", "a classifier or reward model"),
        ("LlamaForRewardModelWithGating", "a reward model"),
        ("LlamaForQuestionAnswering", "a model that marks answers in a text"),
        ("LlamaBidirectionalModel", "an embedder"),
        ("LlamaForCausalLMEagle3", "may compute something else"),
        ("Qwen2ForCausalLM", "may compute something else; if the two compute the same, write LlamaForCausalLM there"),
    ],
)
def test_classes_that_are_no_language_models(changed, architecture, words):
    found = refusal(changed(architectures=[architecture]))
    assert words in found
    assert architecture in found


@pytest.mark.parametrize(
    "classes", [None, [], ["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["LlamaModel"], "Llama", [3]]
)
def test_classes_that_are(changed, classes):
    folder = changed(architectures=classes)
    try:
        AutoConfig.from_pretrained(folder)
    except Exception:  # transformers 5.17 reads lists of words only
        assert "'architectures'" in refusal(folder)
    else:
        inspect(InspectRequest(model=str(folder)))


def test_a_mistral_with_layer_types_is_a_mistral_by_its_class(changed, tmp_path):
    source = tiny_checkpoint(tmp_path / "mistral", family="mistral")
    folder = changed(
        source=source, layer_types=["full_attention"] * 2, architectures=["MistralForCausalLM"], sliding_window=512
    )
    assert inspect(InspectRequest(model=str(folder), max_position_embeddings=512)).model_type == "ministral"


def test_scales_of_the_cache_alone_are_left_over(changed):
    scale = {"model.layers.0.self_attn.k_scale": torch.ones(())}
    folder = changed(lambda tensors: tensors | scale)
    assert inspect(InspectRequest(model=str(folder))).left_over == tuple(scale)


def test_float64_is_computed_and_written_in_float32(changed):
    source, mla = converted(changed(lambda tensors: {name: tensor.double() for name, tensor in tensors.items()}))
    assert torch.allclose(source, mla, atol=1e-4)


def test_a_head_that_is_stored_beside_the_embedding_it_is_tied_to_counts_as_in_transformers(changed):
    # The two differ, and stock transformers then does not tie them.
    source, mla = converted(changed(tie_word_embeddings=True))
    assert torch.allclose(source, mla, atol=1e-4)


ADAPTER = {"adapter_config.json": '{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": ""}


@pytest.mark.parametrize("files", [["adapter_config.json"], ["adapter_model.safetensors"], list(ADAPTER)])
def test_an_adapter_beside_the_weights(changed, cli, files):
    folder = changed()
    for name in files:
        (folder / name).write_text(ADAPTER[name])
    found = refusal(folder)
    assert f"holds an adapter ({', '.join(files)}) beside its weights" in found
    assert "merge the two with peft" in found
    for command in (["eval", folder, "--dataset", folder / "LICENSE"], ["generate", folder, "a"]):
        assert "holds an adapter" in cli(*command).stderr


@pytest.mark.parametrize("config", [False, True])
def test_an_adapter_alone(llama, tmp_path, config):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in ADAPTER.items():
        (folder / name).write_text(content)
    if config:
        shutil.copy(llama / "config.json", folder)
    found = refusal(folder)
    assert "is an adapter (adapter_config.json, adapter_model.safetensors) to another model, org/base" in found


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "has no safetensors weights. Pickled ones"),
        ("pytorch_model-00001-of-00002.bin", "has no safetensors weights. Pickled ones"),
        ("consolidated.safetensors", "It holds consolidated.safetensors, weights in the layout of its maker's"),
        ("model-Q4_K_M.gguf", "choose it with --gguf-file model-Q4_K_M.gguf"),
        ("tf_model.h5", "weights of TensorFlow"),
        ("nothing", "has no weights: model.safetensors or model.safetensors.index.json is needed"),
    ],
)
def test_folders_without_weights_that_can_be_read(llama, tmp_path, file, words):
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(llama / "config.json", folder)
    (folder / file).write_text("")
    assert words in refusal(folder)


def test_what_is_final_comes_before_what_a_flag_can_change(changed, tmp_path):
    source = tiny_checkpoint(tmp_path / "mistral", family="mistral")
    folder = changed(without_head, source=source, sliding_window=64)
    assert "output head was not saved" in refusal(folder)


@pytest.fixture
def on_the_hub(monkeypatch, tmp_path):
    """Put a folder on the hub, and record which files are asked for; weights are in the cache once they are."""
    asked = []

    def put(folder: Path) -> list[str]:
        snapshot = tmp_path / "snapshots" / ("0" * 40)

        def snapshot_download(repo_id, *, allow_patterns, **options):
            asked.extend(allow_patterns)
            snapshot.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                    shutil.copy(path, snapshot)
            return str(snapshot)

        class Api:
            def get_safetensors_metadata(self, repo_id, **options):
                infos = {
                    header.name: TensorInfo(header.stored_as, list(header.shape), (0, 0))
                    for header in CheckpointReader(folder).headers.values()
                }
                file = SafetensorsFileMetadata({}, infos)
                return SafetensorsRepoMetadata(None, False, dict.fromkeys(infos, SINGLE_FILE), {SINGLE_FILE: file})

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(hub, "HfApi", Api)
        return asked

    return put


def test_a_model_of_the_hub_is_judged_before_its_weights_are_fetched(changed, on_the_hub, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    asked = on_the_hub(changed(lambda tensors: tensors | {name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(TransMLAError, match=f"The weights are quantised: {name} is stored as F8_E4M3"):
        plan_conversion(ConvertRequest(model="org/name", output_dir=tmp_path / "out", exact=True))
    assert "config.json" in asked
    assert "*.safetensors" not in asked


def test_an_adapter_on_the_hub_is_seen(changed, on_the_hub, tmp_path):
    folder = changed()
    (folder / "adapter_config.json").write_text(ADAPTER["adapter_config.json"])
    on_the_hub(folder)
    with pytest.raises(TransMLAError, match=r"org/name holds an adapter .* beside its weights"):
        inspect(InspectRequest(model="org/name"))


def test_a_base_model_of_the_hub_is_converted(changed, on_the_hub, tmp_path):
    folder = changed(without_prefix)
    asked = on_the_hub(folder)
    convert(ConvertRequest(model="org/name", output_dir=tmp_path / "mla", exact=True))
    assert "*.safetensors" in asked
    with torch.no_grad():
        assert torch.allclose(load(folder)(TOKENS).logits, load(tmp_path / "mla")(TOKENS).logits, atol=1e-4)


def test_names_that_are_there_with_and_without_the_prefix_are_refused(changed):
    """Stock transformers reads those without it."""

    def twice(tensors):
        return tensors | {name.removeprefix("model."): 2 * tensor for name, tensor in tensors.items()}

    assert "is there twice, with and without the prefix model." in refusal(changed(twice))


def test_a_class_that_is_named_by_a_word_is_heard(changed):
    found = refusal(changed(architectures="LlamaForSequenceClassification"))
    assert "it is a classifier or reward model" in found


@pytest.mark.parametrize(
    ("file", "purpose"),
    [
        ("value_head.safetensors", "a reward model"),
        ("value_head.bin", "a reward model"),
        ("modules.json", "an embedder of sentence-transformers"),
    ],
)
def test_files_that_say_what_a_model_is_used_for_are_heard(changed, file, purpose):
    folder = changed()
    (folder / file).write_text("[]")
    found = refusal(folder)
    assert purpose in found
    assert f"({file})" in found
    (folder / file).unlink()
    inspect(InspectRequest(model=str(folder)))


def test_tensors_that_nothing_reads_are_told_before_the_work(changed):
    folder = changed(lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})
    plan = plan_conversion(ConvertRequest(model=str(folder), output_dir=folder.parent / "out", exact=True))
    assert plan.summary.warnings == (
        "1 tensors are left out, model.layers.0.self_attn.q_proj.bias among them: transformers does not read them for "
        "this family either.",
    )


def test_a_file_of_weights_under_another_name_is_named(changed):
    folder = changed()
    (folder / SINGLE_FILE).rename(folder / "model.fp16.safetensors")
    assert "holds model.fp16.safetensors" in refusal(folder)
