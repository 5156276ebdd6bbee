"""Every sequence once a pass: by one process or several, with workers or without, undisturbed or resumed."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

from tests.factory import TEXT, tiny_tokenizer
from transmla.config import FinetuneRequest
from transmla.errors import DataError
from transmla.finetune.data.datasets import load_data
from transmla.finetune.data.documents import Document
from transmla.finetune.data.order import PassSampler
from transmla.finetune.data.packing import Filler, PackedDataset, StreamedDataset, pack
from transmla.finetune.distill.student import IGNORE_INDEX


def rows(count, first=2, window=4):
    """Rows that are told apart by their first token."""
    documents = (
        Document(list(range(start, start + window)), [True] * window)
        for start in range(first, first + count * window, window)
    )
    return list(pack(documents, window=window, pad_token=0))


def firsts(items):
    return [int(item["input_ids"][0]) for item in items]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 5)))
def test_processes_share_a_pass(num_sequences, batch_size, num_processes, seed, epochs):
    samplers = [
        PassSampler(num_sequences, batch_size=batch_size, seed=seed, process_index=process, num_processes=num_processes)
        for process in range(num_processes)
    ]
    for epoch in epochs:
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        # All have as many batches, none is empty or too large, and together they are a pass.
        assert {len(share) for share in shares} == {len(samplers[0])}
        assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)
        read = [index for share in shares for batch in share for index in batch if not isinstance(index, Filler)]
        assert sorted(read) == list(range(num_sequences))
        # In the order that one process would have with the batches of all.
        alone = PassSampler(num_sequences, batch_size=batch_size * num_processes, seed=seed)
        alone.set_epoch(epoch)
        for together, batches in zip(alone, zip(*shares, strict=True), strict=True):
            assert sorted(together) == sorted(i for batch in batches for i in batch if not isinstance(i, Filler))


def test_passes_and_seeds_have_orders_of_their_own():
    orders = set()
    for seed in range(3):
        sampler = PassSampler(20, batch_size=20, seed=seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            [batch] = sampler
            orders.add(tuple(batch))
    assert len(orders) == 9


def test_a_filler_teaches_nothing():
    dataset = PackedDataset(rows(3))
    filler, item = dataset[Filler(1)], dataset[1]
    assert (filler.pop("labels") == IGNORE_INDEX).all()
    assert (item.pop("labels") != IGNORE_INDEX).any()
    assert all(torch.equal(filler[key], item[key]) for key in item)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_hear_of_the_next_pass(workers, persistent):
    """A worker that outlives a pass has a copy of the data set."""
    dataset, alone = (PackedDataset(rows(6, window=16)) for _ in range(2))
    sampler = PassSampler(6, batch_size=2, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, persistent_workers=persistent)
    cuts = set()
    for epoch in range(3):
        for one in (dataset, alone, sampler):
            one.set_epoch(epoch)
        wanted = [default_collate([alone[index] for index in batch]) for batch in sampler]
        found = list(loader)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, wanted, strict=True))
        assert sorted(torch.cat([batch["input_ids"] for batch in found]).flatten().tolist()) == list(range(2, 98))
        cuts.add(frozenset(int(first) for batch in found for first in batch["input_ids"][:, 0]))
    assert len(cuts) == 3


# Longer than what is shuffled at once, shorter, and both, with one that has a single sequence.
STREAMS = {"long": [1500], "short": [7], "unequal": [1100, 300, 1], "many": [3, 1, 2]}


def stream(lengths, seed=0):
    starts = [2 + 4 * sum(lengths[:number]) for number in range(len(lengths))]
    sources = [rows(length, first) for length, first in zip(lengths, starts, strict=True)]
    return StreamedDataset(sources, seed=seed), sum(lengths)


@pytest.mark.parametrize("lengths", STREAMS.values(), ids=STREAMS)
def test_each_pass_of_a_stream_has_every_sequence_once(lengths):
    dataset, total = stream(lengths)
    items = iter(dataset)
    passes = [firsts(next(items) for _ in range(total)) for _ in range(3)]
    for found in passes:
        assert sorted(found) == list(range(2, 2 + 4 * total, 4))
    if total > 3:
        assert len(set(map(tuple, passes))) == 3
        assert passes[0] != sorted(passes[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_a_pass_of_a_stream(workers):
    dataset, total = stream([40, 11])
    loader = iter(DataLoader(dataset, batch_size=3, num_workers=workers))
    # So many batches are whole passes, whatever the number of workers.
    batches = [next(loader) for _ in range(total * workers)]
    found = Counter(token for batch in batches for token in batch["input_ids"][:, 0].tolist())
    assert set(found) == set(range(2, 2 + 4 * total, 4))
    assert set(found.values()) == {3 * workers}
    again = iter(DataLoader(dataset, batch_size=3, num_workers=workers))
    assert all(torch.equal(next(again)["input_ids"], batch["input_ids"]) for batch in batches)


def test_sources_of_a_stream_are_mixed():
    dataset, _ = stream([60, 60])
    found = firsts(item for item, _ in zip(dataset, range(60), strict=False))
    assert 15 < sum(first < 2 + 4 * 60 for first in found) < 45


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_which_nothing_is_left_is_named(tmp_path, streaming):
    (tmp_path / "long.txt").write_text(TEXT * 4, encoding="utf-8")
    (tmp_path / "short.txt").write_text(TEXT[:100], encoding="utf-8")
    dataset = (str(tmp_path / "long.txt"), str(tmp_path / "short.txt"))
    request = FinetuneRequest(
        checkpoint="mla", output_dir=tmp_path / "out", dataset=dataset,
        window=32, num_eval_windows=4, streaming=streaming, max_steps=1,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"Nothing is left to learn from .*short.txt once 2 sequences of 32 tokens"):
        load_data(request, tiny_tokenizer(), vocab_size=401)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("overflow", ["cut", "drop", "split"])
def test_what_becomes_of_a_streams_long_conversations_is_told(tmp_path, overflow, plain):
    chat = [{"role": "user", "content": "the wheel"}, {"role": "assistant", "content": "a long winter"}]
    tokenizer = tiny_tokenizer()
    if plain:
        tokenizer.chat_template = None
    row = {"prompt": "the wheel", "completion": " a long winter"} if plain else {"messages": chat}
    rows = "".join(json.dumps({**row, "id": number}) + "\n" for number in range(20))
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    request = FinetuneRequest(
        checkpoint="mla", output_dir=tmp_path / "out", dataset=str(tmp_path / "a.jsonl"),
        window=64, num_eval_windows=1, streaming=True, max_steps=1, overflow=overflow,
    )  # fmt: skip
    told = load_data(request, tokenizer, vocab_size=401).told
    assert any("the columns id are not read" in sentence for sentence in told)
    assert any("longer than --window 64 is" in sentence for sentence in told) is (overflow != "split")
