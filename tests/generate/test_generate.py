"""What is generated is what transformers' own ``generate`` says, in both forms of attention."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transmla.config import GenerateRequest
from transmla.errors import UsageError
from transmla.generate.generation_config import Heard
from transmla.generate.report import GenerationReport
from transmla.generate.run import generate
from transmla.generate.sampling import settle_sampling

PROMPT = "The miller's daughter kept"


@pytest.fixture(scope="module")
def pair(exact_pair):
    return tuple(map(str, exact_pair))


def ask(model, **options):
    pieces = []
    report = generate(GenerateRequest(model=model, prompt=PROMPT, device="cpu", **options), write=pieces.append)
    assert "".join(pieces) == report.text
    return report


def own_words(folder, text, *, special=False, **options):
    """What stock transformers makes of a text, with no transmla in between."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special, return_token_type_ids=False)
    model.generation_config.max_length = None
    output = model.generate(**inputs, pad_token_id=1, **options)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("stock", [True, False])
def test_greedy_text_is_stock_s(pair, stock):
    for model in pair:
        report = ask(model, no_chat_template=True, max_new_tokens=40, stock=stock)
        assert report.text == own_words(model, PROMPT, special=True, max_new_tokens=40, do_sample=False)
        assert (report.prompt, report.num_new_tokens, report.finish, report.sampled) == (PROMPT, 40, "length", False)


def test_both_forms_say_the_same_for_200_tokens(pair):
    source, converted = pair
    stock, absorbed = (ask(converted, max_new_tokens=200, stock=stock) for stock in (True, False))
    assert (stock.form, absorbed.form) == ("expanded", "absorbed")
    assert stock.num_new_tokens == 200
    assert absorbed.text == stock.text == ask(source, max_new_tokens=200).text


def test_a_model_without_latent_attention_is_stock_s(pair):
    report = ask(pair[0], max_new_tokens=2)
    assert (report.form, report.architecture) == ("expanded", "LlamaForCausalLM")
    assert (report.kv_numbers_per_token_layer, report.kv_bytes_per_token) == (64, 64 * 2 * 4)
    assert GenerationReport.model_validate_json(report.model_dump_json()) == report


def test_the_chat_template_is_used_where_there_is_one(pair):
    report = ask(pair[0], max_new_tokens=10)
    assert report.prompt == f"user: {PROMPT}\n"
    assert report.text == own_words(pair[0], report.prompt, max_new_tokens=10, do_sample=False)
    assert ask(pair[0], max_new_tokens=2, system="Be brief.").prompt == f"system: Be brief.\nuser: {PROMPT}\n"


def changed_copy(folder, target, file, **changes):
    shutil.copytree(folder, target)
    values = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**values, **changes}))
    return str(target)


def without_template(folder, target):
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").unlink()
    return str(target)


def test_a_model_without_template_continues_the_prompt(pair, tmp_path):
    plain = without_template(pair[0], tmp_path / "plain")
    assert ask(plain, max_new_tokens=5).text == ask(pair[0], max_new_tokens=5, no_chat_template=True).text
    with pytest.raises(UsageError, match=r"--system needs a chat template, and .*plain has none: drop --system\."):
        ask(plain, system="Be brief.")
    with pytest.raises(UsageError, match=r"--system needs a chat template, and --no-chat-template was given"):
        ask(pair[0], system="Be brief.", no_chat_template=True)


def test_a_template_that_refuses(pair, tmp_path):
    folder = tmp_path / "strict"
    shutil.copytree(pair[0], folder)
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}x"
    )
    assert ask(str(folder), max_new_tokens=2).prompt == "x"
    message = r"The chat template of .*strict refuses the prompt \(No system here\): drop --system\."
    with pytest.raises(UsageError, match=message):
        ask(str(folder), system="Be brief.")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].content + 3 }}", "str"),
        ("{{ messages[7].content.x }}", "no element 7|undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0]['content'].strip(5) }}", "strip"),
    ],
)
def test_a_template_that_fails(pair, tmp_path, template, reason):
    shutil.copytree(pair[0], folder := tmp_path / "broken")
    (folder / "chat_template.jinja").write_text(template)
    message = rf"The chat template of .*broken refuses the prompt \(.*({reason}).*\): pass --no-chat-template\."
    with pytest.raises(UsageError, match=message):
        ask(str(folder))
    assert ask(str(folder), max_new_tokens=2, no_chat_template=True).num_new_tokens == 2


def test_several_templates_and_none_is_the_default(pair, tmp_path):
    shutil.copytree(pair[0], folder := tmp_path / "named")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer.chat_template = {"tool_use": "{{ messages[0].content }}", "rag": "x"}
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"named has several chat templates \(.*tool_use.*\), .*: pass --no-chat-temp"):
        ask(str(folder))
    assert ask(str(folder), max_new_tokens=2, no_chat_template=True).prompt == PROMPT
    tokenizer.chat_template = {"default": "so: {{ messages[0].content }}", "rag": "x"}
    tokenizer.save_pretrained(folder)
    assert ask(str(folder), max_new_tokens=2).prompt == f"so: {PROMPT}"


def test_a_prompt_without_tokens_is_refused(pair, tmp_path):
    shutil.copytree(pair[0], folder := tmp_path / "silent")
    (folder / "chat_template.jinja").write_text(" {#- nothing -#} ")
    with pytest.raises(UsageError, match="The prompt has no tokens, as the tokenizer reads it"):
        ask(str(folder))


def test_a_text_begins_once(pair):
    """Though the prompt has the token already that the tokenizer puts in front."""
    report = ask(pair[0], no_chat_template=True, max_new_tokens=10)
    request = GenerateRequest(model=pair[0], prompt=f"<s>{PROMPT}", no_chat_template=True, max_new_tokens=10)
    again = generate(request, write=lambda piece: None)
    assert (again.text, again.num_prompt_tokens) == (report.text, report.num_prompt_tokens)


def test_it_stops_where_the_text_ends(pair, tmp_path):
    whole = ask(pair[0], max_new_tokens=12)
    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    tokens = AutoTokenizer.from_pretrained(pair[0])(whole.prompt, add_special_tokens=False, return_tensors="pt")
    said = model.generate(tokens["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=1)
    end = said[0, -1].item()
    report = ask(changed_copy(pair[0], tmp_path / "ends", "generation_config.json", eos_token_id=[1, end]))
    assert report.finish == "stop"
    assert report.num_new_tokens <= 5


def test_it_stops_at_the_end_of_the_context(pair, tmp_path):
    short = changed_copy(pair[0], tmp_path / "short", "config.json", max_position_embeddings=40)
    report = ask(short)
    assert report.finish == "context"
    assert report.num_prompt_tokens + report.num_new_tokens == 40
    with pytest.raises(
        UsageError, match=r"The prompt has \d+ tokens and the model a context of 40, .*: shorten PROMPT"
    ):
        generate(GenerateRequest(model=short, prompt=PROMPT * 9), write=print)


def test_the_seed_decides_what_is_drawn(pair):
    def drawn(seed):
        return ask(pair[0], max_new_tokens=12, temperature=1.5, top_k=50, seed=seed)

    assert drawn(1).text == drawn(1).text != drawn(2).text
    assert drawn(1).sampled


@pytest.mark.parametrize(
    ("given", "flags", "expected"),
    [
        ({}, {}, (False, None, None, None)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {}, (True, 0.6, 0.9, None)),
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": False}, (False, None, None, None)),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0}, (False, None, None, None)),
        ({"do_sample": True, "temperature": 0.6}, {"top_k": 5}, (True, 0.6, None, 5)),
        ({}, {"temperature": 0.8}, (True, 0.8, None, None)),
        ({}, {"do_sample": True}, (True, None, None, None)),
        ({"do_sample": True, "temperature": 0.0, "top_k": 9}, {}, (False, None, None, None)),
        ({"do_sample": True, "top_p": 0.5}, {"temperature": 1e-9}, (False, None, None, None)),
    ],
)
def test_flags_win_over_the_model_s_own_sampling(given, flags, expected):
    request = GenerateRequest(model="m", prompt="p", **flags)
    config = settle_sampling(request, Heard(max_length=9, **given), num_prompt_tokens=1, max_new_tokens=7)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == expected
    assert (config.max_length, config.max_new_tokens) == (None, 7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"do_sample": False, "top_p": 0.5, "top_k": 3}, "Nothing is drawn .*: drop it, or drop --top-p and --top-k"),
        ({"temperature": 0, "top_k": 3}, "Nothing is drawn .* or drop --top-k"),
        ({"temperature": 0, "do_sample": True}, "--do-sample draws and --temperature 0 does not"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(UsageError, match=message):
        settle_sampling(GenerateRequest(model="m", prompt="p", **flags), Heard(), num_prompt_tokens=1, max_new_tokens=7)


def test_an_empty_prompt_is_refused(pair):
    with pytest.raises(UsageError, match="The prompt is empty: write some text as PROMPT"):
        generate(GenerateRequest(model=pair[0], prompt=" \n"), write=print)


def test_the_type_is_the_stored_one_unless_asked_for(pair):
    assert ask(pair[0], max_new_tokens=1).dtype == "float32"
    report = ask(pair[0], max_new_tokens=1, dtype="bfloat16")
    assert (report.dtype, report.kv_bytes_per_token) == ("bfloat16", 64 * 2 * 2)
    assert report.tokens_per_second is None
    assert torch.get_default_dtype() == torch.float32
