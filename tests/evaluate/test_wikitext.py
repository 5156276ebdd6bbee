"""Perplexity of WikiText as GPTQ and the papers after it have it, against a loop of that protocol."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.factory import TEXT, tiny_checkpoint, tiny_tokenizer
from transmla.config import EvalRequest
from transmla.evaluate.run import evaluate

SENTENCES = [sentence for sentence in TEXT.split(".") if sentence.strip()]
TITLES = [f" = {SENTENCES[number % 3].split()[0]} = \n" for number in range(60)]
ROWS = [row for title in TITLES for row in ("", title, "", SENTENCES[1] + " .\n")]
WINDOW = 48
SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_assets.py"


def loop(model, tokenizer, rows, *, first, each, window_size=WINDOW):
    """Join, tokenise once, cut into windows; ``first`` stands in front of the text, ``each`` of every window."""
    ids = [*first, *tokenizer("\n\n".join(rows), add_special_tokens=False, verbose=False)["input_ids"]]
    size, total, count = window_size - len(each), 0.0, 0
    for start in range(0, len(ids) // size * size, size):
        window = torch.tensor([[*each, *ids[start : start + size]]])
        with torch.no_grad():
            logits = model(window).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return math.exp(total / count)


@pytest.mark.parametrize("bos", ["auto", "always", "never", "once"])
def test_perplexity_is_that_of_the_published_protocol(tmp_path, bos):
    folder = tiny_checkpoint(tmp_path / "source")
    parquet.write_table(pyarrow.table({"text": ROWS}), tmp_path / "wikitext.parquet")
    tokenizer = tiny_tokenizer()
    begin = [tokenizer.bos_token_id]
    first, each = {"never": ([], []), "once": (begin, [])}.get(bos, ([], begin))
    expected = loop(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer, ROWS, first=first, each=each)
    request = EvalRequest(
        source=str(folder), dataset=(str(tmp_path / "wikitext.parquet"),), window=WINDOW, bos=bos, no_cache=True
    )
    [text] = evaluate(request).texts
    assert text.scores[0].perplexity == pytest.approx(expected, rel=1e-5)
    assert "rows joined by an empty line" in text.data.protocol
    known = {"never": "no BOS", "once": "<s> in front of the text"}
    said = known.get(bos, "<s> in front of each, all after <s> judged")
    assert said in text.data.protocol
    assert text.data.num_rows == len(ROWS)
    # Of the text itself, in which everything is.
    tokens = len(tokenizer("\n\n".join(ROWS), add_special_tokens=False, verbose=False)["input_ids"])
    size = WINDOW - len(each)
    assert text.data.num_tokens_dropped == (tokens + len(first)) % size


@pytest.mark.slow
@pytest.mark.parametrize("bos", ["auto", "always", "never", "once"])
def test_perplexity_of_a_real_model_is_that_of_the_published_protocol(tmp_path, bos):
    """SmolLM2-135M on Wikipedia articles in the form of WikiText; its tokenizer has a BOS that it puts nowhere."""
    found = subprocess.run([sys.executable, SCRIPT], capture_output=True, encoding="utf-8", check=True)
    assets = Path(found.stdout.strip())
    paragraphs = (assets / "wiki-test.txt").read_text(encoding="utf-8").split("\n\n")[:40]
    rows = [row for text in paragraphs for row in ("", f" = {' '.join(text.split()[:2])} = \n", "", f" {text} \n")]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "wikitext.parquet")
    folder, [gguf] = assets / "smollm2", (assets / "smollm2").glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32).eval()
    each = [tokenizer.bos_token_id] if bos == "always" else []
    expected = loop(model, tokenizer, rows, first=[], each=each, window_size=512)
    request = EvalRequest(
        source=str(folder),
        gguf_file=gguf.name,
        dataset=(str(tmp_path / "wikitext.parquet"),),
        window=512,
        bos=bos,
        dtype="float32",
        no_cache=True,
    )
    [text] = evaluate(request).texts
    assert text.scores[0].perplexity == pytest.approx(expected, rel=1e-5)
