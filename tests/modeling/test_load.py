"""What a loaded model is, whatever its files say besides; and types in which it cannot be computed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import tiny_checkpoint
from tests.modeling.models import latent_model, some_ids
from transmla.checkpoint.source import Source
from transmla.config import ConvertRequest
from transmla.convert.run import convert
from transmla.errors import UsageError
from transmla.modeling.load import load_model

CPU = torch.device("cpu")
SMALL = {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "num_windows": 8, "window": 64, "num_heldout_windows": 2}


@pytest.fixture(scope="module")
def conversions(tmp_path_factory, calibration_text):
    """Conversions of one model in several ways."""
    root = tmp_path_factory.mktemp("conversions")
    common = {"model": str(tiny_checkpoint(root / "source")), "device": "cpu"}
    fitted = {**common, **SMALL, "calibration": (str(calibration_text),)}
    convert(ConvertRequest(**common, output_dir=root / "exact", exact=True))
    convert(ConvertRequest(**fitted, output_dir=root / "fitted"))
    convert(ConvertRequest(**fitted, output_dir=root / "queries", q_lora_rank=24))
    convert(ConvertRequest(**fitted, output_dir=root / "norm", latent_norm="fitted"))
    convert(ConvertRequest(**fitted, output_dir=root / "norm-queries", latent_norm="fitted", q_lora_rank=24))
    return root


def load(folder, dtype, **options):
    return load_model(Source(folder.name, folder), dtype=dtype, device=CPU, **options)


@pytest.mark.parametrize("name", ["exact", "fitted", "queries", "norm-queries"])
def test_latents_that_float16_cannot_hold_are_refused(conversions, name):
    message = rf"^{name} cannot be computed in float16, .* about \de-0[5-9], .* Pass --dtype bfloat16 or float32\.$"
    with pytest.raises(UsageError, match=message):
        load(conversions / name, "float16")
    with pytest.raises(UsageError, match="Pass --teacher-dtype bfloat16 or float32"):
        load(conversions / name, "float16", flag="--teacher-dtype")
    for dtype in ("bfloat16", "float32", "auto"):
        load(conversions / name, dtype)


def test_the_stored_type_may_be_float16_and_the_report_gone(conversions, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(conversions / "fitted", folder)
    (folder / "transmla_report.json").unlink()
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    with pytest.raises(UsageError, match="half cannot be computed in float16"):
        load(folder, "auto")


@pytest.mark.parametrize("name", ["norm", "source"])
def test_what_float16_holds_is_loaded_in_it_and_computes_the_same(conversions, name):
    model, half = load(conversions / name, "float32"), load(conversions / name, "float16")
    assert half.dtype == torch.float16
    ids = some_ids(2, 40)
    with torch.inference_mode():
        expected, found = model(ids).logits, half(ids).logits.float()
    # Measured 0.003 to 0.006 over eight seeds of the text; the largest of so many differences is a matter of luck.
    assert (found - expected).square().mean().sqrt() < 0.01 * expected.std()


@pytest.mark.parametrize("variant", ["v3", "v2"])
def test_native_models_are_loaded_in_float16(variant, tmp_path):
    latent_model(variant).save_pretrained(tmp_path)
    assert load(tmp_path, "float16").dtype == torch.float16


def test_what_a_config_says_of_outputs_is_for_others(conversions, tmp_path):
    folder = tmp_path / "told"
    shutil.copytree(conversions / "exact", folder)
    config = json.loads((folder / "config.json").read_text())
    told = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "use_cache": False}
    (folder / "config.json").write_text(json.dumps({**config, **told, "num_beams": 4, "temperature": 2.0}))
    # Neither must what generates elsewhere keep a model from being loaded here.
    (folder / "generation_config.json").write_text(json.dumps({"num_return_sequences": 3, "compile_config": {}}))
    model = load(folder, "float32")
    ids = some_ids(1, 9)
    with torch.inference_mode():
        output = model(ids)
        torch.testing.assert_close(output.logits, load(conversions / "exact", "float32")(ids).logits)
        assert output.hidden_states is None
        assert model.generate(ids, max_new_tokens=3, pad_token_id=0).shape == (1, 12)
