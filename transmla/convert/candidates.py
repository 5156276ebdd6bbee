"""The ways to convert a model, as commands that work: by ratio, and what every engine makes of it.

Each way goes through the same choices as a conversion (:mod:`transmla.convert.settle`), so what is named here is not
refused there.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from transmla.arch.spec import AttentionSpec
from transmla.config import ConvertRequest, EngineName, InspectRequest
from transmla.config.refusal import HALF, Change, flags_of
from transmla.convert.settle import Way, possible
from transmla.convert.validate import choose
from transmla.deepseek.engines import ENGINES, dictating, engines_for
from transmla.errors import TransMLAError
from transmla.records import Record

_RATIOS = (0.5, 0.333, 0.25, 0.125)
_EXACT: Change = {"exact": True}
_FOLD: Change = {"biases": "merge"}


class Candidate(Record):
    """One way to convert.

    Attributes:
        flags: of ``transmla convert``; ``FILE`` stands for the user's text.
        command: the whole command line.
        kv_bytes_per_token: in the type of the written weights.
        share: numbers that are cached, as a share of the source's.
        engines: those whose rules the sizes meet.
    """

    flags: tuple[str, ...]
    command: str
    exact: bool
    kv_lora_rank: int
    qk_rope_head_dim: int
    kv_bytes_per_token: int
    kv_bytes_in_context: int
    share: float
    engines: tuple[str, ...]


class Verdict(Record):
    """What an engine makes of the model.

    Attributes:
        loads: ``exact``: with these flags its logits are the source's; ``approximate``: with these flags; ``no``.
        flags: of ``transmla convert``.
        command: the whole command line; empty where there is none.
        share: numbers that are cached, as a share of the source's, where it loads.
        why: what is in the way of more.
    """

    engine: EngineName
    loads: Literal["exact", "approximate", "no"]
    flags: tuple[str, ...]
    command: str
    share: float | None
    why: str


@dataclass(frozen=True, eq=False)
class Candidates:
    """The ways to convert one model.

    Attributes:
        asked: of ``inspect``; what it says of the source is said to ``convert``, too.
        spec: of the source.
        stored: type of its weights.
    """

    asked: InspectRequest
    spec: AttentionSpec
    stored: torch.dtype

    def candidates(self) -> Iterator[Candidate]:
        """Try the exact mode, common ratios, and the sizes that single engines insist on."""
        ways: list[Change] = [_EXACT, *({"kv_ratio": ratio} for ratio in _RATIOS)]
        # Few engines hold biases.
        if self.spec.biases:
            ways += [{"kv_ratio": ratio, **_FOLD} for ratio in _RATIOS]
        fixed = sorted({(name, cache) for name, engine in ENGINES.items() for cache in engine.caches})
        ways += [{"engine": (name,), "kv_lora_rank": rank, "qk_rope_head_dim": rope} for name, (rank, rope) in fixed]
        for change in ways:
            way = self._possible(change)
            if way is None or self._share(way) > 1:
                continue
            request, choices = way.request, way.choices
            token_bytes = choices.sizes.cache_numbers * choices.dtype.itemsize * self.spec.num_hidden_layers
            yield Candidate(
                flags=self._flags(way),
                command=self._command(way),
                exact=request.exact,
                kv_lora_rank=choices.sizes.kv_lora_rank,
                qk_rope_head_dim=choices.sizes.qk_rope_head_dim,
                kv_bytes_per_token=token_bytes,
                kv_bytes_in_context=token_bytes * self.asked.context,
                share=self._share(way),
                engines=tuple(engines_for(choices.sizes, choices.spec, request)),
            )

    def verdict(self, name: EngineName) -> Verdict:
        """Try the exact mode, then half of the cache, or the size nearest to that which the engine takes."""
        engine: Change = {"engine": (name,)}
        exact, half = ({**change, **engine} for change in (_EXACT, HALF))
        way = self._possible(exact) or self._possible(half)
        if way is None:
            why = self._refusal({**half, **_FOLD}) if self._foldable else self._refusal(half)
            return Verdict(engine=name, loads="no", flags=(), command="", share=None, why=why)
        sizes = way.choices.sizes
        why = "" if way.request.exact else self._refusal(exact)
        if dictating((name,)):
            # A ratio that is not kept to would say something else than what is cached.
            fixed = {**engine, "kv_lora_rank": sizes.kv_lora_rank, "qk_rope_head_dim": sizes.qk_rope_head_dim}
            way = self._possible(fixed) or way
        if self.spec.mixture and ENGINES[name].shared_expert:
            why += " A mixture is given a shared expert of zeros, without which it does not load."
        if self.spec.mixture and way.request.exact:
            why = "Up to the routing, which is fitted on a text; the report says how far."
        return Verdict(
            engine=name,
            loads="exact" if way.request.exact else "approximate",
            flags=self._flags(way),
            command=self._command(way),
            share=self._share(way),
            why=why,
        )

    @property
    def _foldable(self) -> bool:
        return bool(self.spec.biases) and "o_proj" not in self.spec.biases

    @property
    def _nothing(self) -> ConvertRequest:
        flags = {"model": self.asked.model, "output_dir": propose_output(self.asked.model)}
        return ConvertRequest.build(recipe=None, flags=flags)

    def _possible(self, change: Change) -> Way | None:
        return possible(self._nothing, self.spec, change, stored=self.stored)

    def _refusal(self, change: Change) -> str:
        """Return why a change is refused, without advice: the flags beside it are that."""
        try:
            choose(self._nothing.model_copy(update=dict(change)), self.spec, stored=self.stored)
        except TransMLAError as error:
            return f"{getattr(error, 'reason', error)}."
        return ""

    def _share(self, way: Way) -> float:
        return way.choices.sizes.cache_numbers / self.spec.cache_numbers

    def _flags(self, way: Way) -> tuple[str, ...]:
        asked = {name: getattr(self.asked, name) for name in ("gguf_file", "revision", "max_position_embeddings")}
        return tuple(flags_of({**way.change, **asked}))

    def _command(self, way: Way) -> str:
        words = ["transmla", "convert", self.asked.model, str(propose_output(self.asked.model))]
        words += [word for flag in self._flags(way) for word in flag.split(" ", 1)]
        return shlex.join(words)


def propose_output(model: str) -> Path:
    """Propose a folder beside where the user is, named after the model."""
    return Path(f"{Path(model).resolve().name if Path(model).exists() else Path(model.partition('@')[0]).name}-mla")
