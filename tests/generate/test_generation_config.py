"""Whatever a generation config holds: one answer, stock transformers' where a field is heard, or a sentence."""

import inspect
import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from transmla.checkpoint.source import Source
from transmla.config import GenerateRequest
from transmla.errors import CheckpointError, TransMLAError
from transmla.generate import run as module
from transmla.generate.generation_config import ASIDE, FILE, HARMLESS, Heard, read_settings
from transmla.generate.run import generate

PROMPT = "The miller's daughter kept"
NEW = 24
# What the tiny model writes by itself; the tests below choose values that have an effect on it.
DRAWN = {"do_sample": True}

HEARD = {
    # field: (a value, what else must be set for it)
    "min_length": (30, {"eos_token_id": "second"}),
    "min_new_tokens": (6, {"eos_token_id": "second"}),
    "max_time": (1e-9, {}),
    "stop_strings": ("second word", {}),
    "eos_token_id": ("second", {}),
    "forced_eos_token_id": (7, {}),
    "do_sample": (True, {}),
    "temperature": (3.0, DRAWN),
    "top_k": (2, DRAWN),
    "top_p": (0.2, DRAWN),
    "min_p": (0.9, DRAWN),
    "top_h": (0.1, DRAWN),
    "typical_p": (0.1, DRAWN),
    "epsilon_cutoff": (0.05, DRAWN),
    "eta_cutoff": (0.9, DRAWN),
    "repetition_penalty": (5.0, {}),
    "encoder_repetition_penalty": (9.0, {}),
    "no_repeat_ngram_size": (1, {}),
    "encoder_no_repeat_ngram_size": (1, {}),
    "bad_words_ids": ("first, in a list of lists", {}),
    "sequence_bias": ("a bias on the first", {}),
    "suppress_tokens": ("first, in a list", {}),
    "begin_suppress_tokens": ("first, in a list", {}),
    "exponential_decay_length_penalty": ([1, 50.0], {"eos_token_id": 7}),
    "guidance_scale": (3.0, {}),
    "watermarking_config": ({"bias": 20.0, "greenlist_ratio": 0.1}, {}),
}
"""Fields that are heard and change what is written."""
HEARD_WITHOUT_EFFECT = {
    "forced_bos_token_id": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "cache_implementation": "static",
    "disable_compile": True,
    "prefill_chunk_size": 3,
    "max_length": 500,
    "max_new_tokens": 400,
}
SET_ASIDE = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[3]],
    "num_return_sequences": 2,
    "continuous_batching_config": {"page_size": 16},
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "use_mtp": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "is_assistant": True,
    "speculation_type": "dflash",
    "token_healing": True,
    "use_cache": False,
    "cache_implementation": "quantized",
    "cache_config": {"backend": "quanto", "nbits": 4},
    "compile_config": {"fullgraph": True},
}
WITHOUT_EFFECT = {
    "early_stopping": True,
    "length_penalty": 2.0,
    "diversity_penalty": 0.5,
    "low_memory": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "max_matching_ngram_size": 3,
    "max_cache_len": 300,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": False,
    "pad_token_id": -1,
    "bos_token_id": 100_000,
    "decoder_start_token_id": 3,
    "transformers_version": "4.1.0",
    "_from_model_config": True,
    "_commit_hash": "abc",
}


@pytest.fixture(scope="module")
def folder(exact_pair, tmp_path_factory):
    target = tmp_path_factory.mktemp("settings") / "mla"
    shutil.copytree(exact_pair[1], target)
    return target


@pytest.fixture(scope="module")
def stock(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config = GenerationConfig()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def kept():
    """Loaded models by folder."""
    return {}


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, kept):
    """Load a model once for all runs, for there are hundreds."""
    load = module.load_model

    def once(model, **options):
        if model.folder not in kept:
            kept[model.folder] = load(model, **options)
        return kept[model.folder]

    monkeypatch.setattr(module, "load_model", once)


def ask(folder, config, **options):
    """Write the generation config and generate with it; return the report and what was told before."""
    (folder / FILE).write_text(json.dumps(config))
    told = []
    request = GenerateRequest(
        model=str(folder), prompt=PROMPT, device="cpu", no_chat_template=True, **{"max_new_tokens": NEW, **options}
    )
    report = generate(request, write=lambda piece: None, tell=told.append)
    assert tuple(told) == report.notes
    return report


def own_words(stock, config):
    """What stock transformers writes with this config."""
    model, tokenizer = stock
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    options = {"pad_token_id": 0, **config, "max_new_tokens": NEW}
    # Stock hands the tokenizer to every layer, which take it for nothing.
    extra = {"tokenizer": tokenizer} if "stop_strings" in config else {}
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_config=GenerationConfig(**options), **extra
    )
    return tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def plain(stock):
    """The tokens that the model writes by itself."""
    model, tokenizer = stock
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    said = model.generate(tokens, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return said[0, tokens.shape[1] :].tolist()


def filled(config, plain, tokenizer):
    """Put the model's own tokens where they are meant."""
    values = {
        "second": plain[1],
        "second word": tokenizer.decode(plain[1:2]),
        "first, in a list": [plain[0]],
        "first, in a list of lists": [[plain[0]]],
        "a bias on the first": [[[plain[0]], -50.0]],
    }
    return {name: values.get(value, value) if isinstance(value, str) else value for name, value in config.items()}


def test_every_field_of_transformers_is_in_one_table_and_tried():
    tables = (Heard.model_fields.keys(), ASIDE.keys() - {"cache_implementation"}, HARMLESS)
    assert sum(map(len, tables)) == len(set().union(*tables))
    # As they are read off the keywords, where some releases have a field that others have not.
    fields = set(re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(GenerationConfig.__init__)))
    assert len(fields) > 60
    assert fields - set().union(*tables) == set()
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} - set().union(*tables) == set()
    tried = HEARD.keys() | HEARD_WITHOUT_EFFECT.keys() | SET_ASIDE.keys() | WITHOUT_EFFECT.keys()
    assert tried == set().union(*tables)


@pytest.mark.parametrize("name", HEARD)
def test_what_is_heard_is_written_as_stock_writes_it(name, folder, stock, plain):
    value, others = HEARD[name]
    config = filled({**others, name: value}, plain, stock[1])
    report = ask(folder, config)
    # A penalty on half a distribution, or a watermark, must not be lost on the way.
    without = ask(folder, filled(others, plain, stock[1]))
    assert report.text == own_words(stock, config)
    assert report.text != without.text
    assert report.notes == ()


@pytest.mark.parametrize("name", HEARD_WITHOUT_EFFECT)
def test_what_is_heard_and_changes_nothing_here(name, folder, stock):
    report = ask(folder, {name: HEARD_WITHOUT_EFFECT[name]})
    assert report.text == ask(folder, {}).text == own_words(stock, {})
    assert report.notes == ()
    assert (report.num_new_tokens, report.kv_numbers_per_token_layer, report.kv_bytes_per_token) == (NEW, 64, 512)


@pytest.mark.parametrize("name", SET_ASIDE)
def test_what_is_set_aside_is_told(name, folder, stock):
    report = ask(folder, {name: SET_ASIDE[name]})
    assert report.text == own_words(stock, {})
    (note,) = report.notes
    assert re.fullmatch(rf"Set aside from generation_config.json of .*: {name} .+, for .+\.", note)
    assert (report.num_new_tokens, report.kv_numbers_per_token_layer) == (NEW, 64)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_decides_nothing_is_no_matter(name, folder, stock):
    report = ask(folder, {name: WITHOUT_EFFECT[name]})
    assert (report.text, report.notes) == (own_words(stock, {}), ())


def test_several_that_go_together_are_one_line(folder):
    report = ask(folder, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.3, "use_cache": False})
    assert len(report.notes) == 2
    assert "num_beams 4, num_beam_groups 2, for" in report.notes[0]


def test_a_field_that_nobody_knows_is_told(folder):
    report = ask(folder, {"astral_decoding": 3, "custom_generate": "x", "other": None})
    (note,) = report.notes
    assert note.endswith(f"{folder}: astral_decoding, custom_generate, which nobody here knows.")


def test_code_of_a_model_is_not_run_and_that_is_told(folder):
    code = folder / "custom_generate"
    code.mkdir()
    (code / "generate.py").write_text("raise SystemExit(9)")
    try:
        assert ask(folder, {}).notes == (f"Not run: custom_generate of {folder}, for no code of a model is.",)
    finally:
        shutil.rmtree(code)


def test_lengths_that_would_end_sooner_are_told(folder):
    report = ask(folder, {"max_new_tokens": 3})
    assert report.num_new_tokens == NEW
    where = f"generation_config.json of {folder}"
    assert report.notes == (f"Set aside from {where}: max_new_tokens 3, for --max-new-tokens is 24.",)
    assert ask(folder, {"max_length": 9}).notes == (
        f"Set aside from {where}: max_length 9, for --max-new-tokens is 24.",
    )


def test_values_for_a_drawing_that_does_not_happen_are_told(folder, stock):
    config = {"temperature": 0.6, "top_p": 0.9, "top_k": 50}
    report = ask(folder, config)
    assert (report.sampled, report.text) == (False, own_words(stock, {}))
    assert report.notes == (
        f"Of no effect in generation_config.json of {folder}, as in transformers: temperature 0.6, top_p 0.9, for it "
        "does not say do_sample; --do-sample does.",
    )
    assert ask(folder, config, do_sample=False).notes == ()
    assert ask(folder, config, do_sample=True).sampled


def test_a_temperature_of_zero_draws_nothing(folder, stock):
    report = ask(folder, {"do_sample": True, "temperature": 0})
    assert (report.sampled, report.text) == (False, own_words(stock, {}))


def test_no_limit_has_two_spellings(folder):
    texts = {ask(folder, {**DRAWN, "top_k": value, "temperature": 3.0}).text for value in (-1, 0)}
    assert len(texts) == 1
    assert texts != {ask(folder, {**DRAWN, "top_k": 2, "temperature": 3.0}).text}


def test_why_it_stopped(folder, stock, plain):
    word = stock[1].decode(plain[1:2])
    report = ask(folder, {"stop_strings": [word, "never"]})
    assert (report.finish, report.text.endswith(word), report.num_new_tokens <= 2) == ("stop", True, True)
    assert ask(folder, {"max_time": 1e-9}).finish == "time"
    assert ask(folder, {"eos_token_id": [plain[2], 100_000]}).finish == "stop"
    assert ask(folder, {"eos_token_id": None}).finish == "length"
    assert ask(folder, {"forced_eos_token_id": 1, "eos_token_id": 1}).finish == "stop"


@pytest.mark.parametrize("with_window", [False, True])
def test_a_static_cache_counts_what_is_cached(with_window, folder, exact_pair, tmp_path):
    """Not the room that it has."""
    if with_window:
        folder = tmp_path / "window"
        shutil.copytree(exact_pair[0], folder)
        config = json.loads((folder / "config.json").read_text())
        changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 6}
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
    for kind in ("static", "dynamic"):
        report = ask(folder, {"cache_implementation": kind}, max_new_tokens=20)
        assert (report.kv_numbers_per_token_layer, report.kv_bytes_per_token) == (64, 64 * 2 * 4)


JUNK = (
    *("x", "", -1, 0, 1, 2, 1.5, 1e-9, 1e300, True, 10**9, 10**30, float("inf"), float("nan")),
    *([], [1], [1, 2], [[1, 2]], [[[1], 2]], [[]], [["x"]], [10**9], [[10**9]], [10**30], {}, {"a": 1}),
)


VOCAB = 401
SEEN = set()
"""What has been generated with already, for most of what decides nothing comes to the same."""


@pytest.mark.parametrize("name", sorted(Heard.model_fields.keys() | ASIDE.keys() | HARMLESS))
def test_junk_ends_in_a_sentence_or_in_one_answer(name, folder):
    for value in JUNK:
        for others in ({}, {"do_sample": True, "eos_token_id": 7}):
            said = outcome(folder, {**others, name: value})
            assert re.fullmatch(r"1|2|The generation_config\.json of .* is not valid: .*\. Mend it\.", said)


def outcome(folder, config):
    """How many tokens are written, or the sentence that is said."""
    (folder / FILE).write_text(json.dumps(config))
    try:
        heard = read_settings(Source(str(folder), folder), vocab_size=VOCAB).heard
        if (known := heard.model_dump_json()) in SEEN:
            return "1"
        SEEN.add(known)
        return str(ask(folder, config, max_new_tokens=2).num_new_tokens)
    except TransMLAError as error:
        return str(error)


def test_a_file_that_is_no_json_is_refused(folder):
    for text, message in (("{", "is not valid JSON"), ("[]", "must hold a JSON object")):
        (folder / FILE).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_settings(Source(str(folder), folder), vocab_size=VOCAB)


def test_without_a_file_the_model_s_config_is_heard_as_stock_hears_it(folder, stock, plain):
    before = (folder / "config.json").read_text()
    (folder / FILE).unlink()
    try:
        changes = {"use_cache": False, "eos_token_id": plain[2], "top_k_experts": 3, "early_stopping": True}
        (folder / "config.json").write_text(json.dumps({**json.loads(before), **changes}))
        settings = read_settings(Source(str(folder), folder), vocab_size=VOCAB)
        assert settings.heard == Heard(eos_token_id=[plain[2]])
        assert settings.notes == (
            f"Set aside from config.json of {folder}: use_cache False, for the text is the same with a cache, and "
            "comes sooner.",
        )
    finally:
        (folder / "config.json").write_text(before)
