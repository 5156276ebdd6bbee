"""Is a checkpoint whole? Files, config, shapes, values, checksums, decoding, and on request its source's logits.

Every check is made, whatever the others have found, but for those that cannot be made after one that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from transmla.arch.experts import ExpertNames, are_packed, unpacked_shapes
from transmla.arch.families import FAMILIES
from transmla.arch.skeleton import Skeleton
from transmla.arch.weight_names import check_layers, left_over, stored_shapes
from transmla.checkpoint.checksums import recorded_checksums, weight_checksums
from transmla.checkpoint.model_files import FINETUNE_REPORT_FILE, RECIPE_FILE, REPORT_FILE, read_report
from transmla.checkpoint.reader import CheckpointReader
from transmla.checkpoint.source import Source, open_source
from transmla.config import VerifyRequest
from transmla.config.request import read_recipe
from transmla.data.synthetic import needle_prompt
from transmla.data.text import load_tokenizer
from transmla.data.tokens import check_known, encode_text, text_start
from transmla.device import choose_device
from transmla.errors import TransMLAError, UnsupportedModelError, UsageError
from transmla.modeling.compare import check_comparable
from transmla.modeling.load import is_quantizable, load_model, read_config
from transmla.progress import Progress, Silent
from transmla.verify.decoding import LAYERS, DecodingReport, check_decoding
from transmla.verify.logits import LogitsReport, compare_with_source, speak
from transmla.verify.report import Check, Outcome, Verification

_SENTENCE = "The old captain walked past an empty house before dinner, and remembered the grey river in the morning. "
TOKENS, TEXTS = 256, 4
"""Of the comparison with the source: tokens of a text, and texts."""
SAME = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
"""How far logits of an exact conversion may be off, in their standard deviations, by the type that is stored: in
float32 a hundred times what is found, in the others more than what their rounding alone comes to in deep models."""


def verify(request: VerifyRequest, *, progress: Progress | None = None) -> Verification:
    """Check a checkpoint, one tensor in memory at a time.

    Decoding is tried on the first layers; only the comparison with a source loads whole models.

    Raises:
        TransMLAError: there is no checkpoint to check. What is wrong with one is in the result.
    """
    device = choose_device(request.device)
    source = open_source(request.model, revision=request.revision, token=request.token)
    run = _Run(source, progress or Silent())
    checks = [*run.checks()]
    whole = all(check.outcome != "failed" for check in checks)
    checks.append(_after("decoding", whole, lambda: run.check_decoding(device)))
    if request.source is not None:
        checks.append(_after("logits", whole, lambda: run.check_logits(request, device)))
    return Verification(
        model=source.name,
        checks=tuple(checks),
        checksums=run.checksums,
        decoding=run.decoding,
        logits=run.logits,
    )


def _after(name: str, whole: bool, check: Callable[[], tuple[Outcome, str]]) -> Check:
    """Make a check that computes with a checkpoint, if it is whole."""
    if not whole:
        return Check(name=name, outcome="skipped", found="needs a checkpoint that is whole")
    try:
        outcome, found = check()
    except UnsupportedModelError as error:
        outcome, found = "skipped", str(error)
    except TransMLAError as error:
        outcome, found = "failed", str(error)
    return Check(name=name, outcome=outcome, found=found)


class _Run:
    """What the checks of one checkpoint hand on to each other."""

    def __init__(self, source: Source, progress: Progress) -> None:
        self._source, self._progress = source, progress
        self._config: PreTrainedConfig | None = None
        self._reader: CheckpointReader | None = None
        self.checksums: dict[str, str] | None = None
        self.decoding: DecodingReport | None = None
        self.logits: LogitsReport | None = None

    def checks(self) -> Iterator[Check]:
        """Make all checks that need no other model."""
        for name, check in (
            ("config", self._check_config),
            ("files", self._check_files),
            ("shapes", self._check_shapes),
            ("values", self._check_values),
            ("checksums", self._check_checksums),
            ("tokenizer", self._check_tokenizer),
        ):
            try:
                outcome, found = check()
            except TransMLAError as error:
                outcome, found = "failed", str(error)
            yield Check(name=name, outcome=outcome, found=found)

    def _check_config(self) -> tuple[Outcome, str]:
        self._config = read_config(self._source, computed=False)
        if is_quantizable(self._config) and self._profile() == "portable":
            return "failed", (
                f"rms_norm_eps is {self._config.rms_norm_eps:g}, and the recipe says --profile portable: config.json "
                "is not the one that was written"
            )
        return "passed", f"{self._config.model_type}, {self._config.num_hidden_layers} layers"

    def _check_files(self) -> tuple[Outcome, str]:
        folder = self._source.folder
        self._reader = CheckpointReader(folder)
        files = {header.file for header in self._reader.headers.values()}
        if strays := {path.name for path in folder.glob("*.safetensors")} - files:
            return "failed", f"{min(strays)} belongs to no index; delete it, or look for the index that names it."
        size = sum(header.nbytes for header in self._reader.headers.values())
        return "passed", f"{len(self._reader.headers):,} tensors in {len(files)} files, {size:,} bytes"

    def _check_shapes(self) -> tuple[Outcome, str]:
        if self._config is None or self._reader is None:
            return "skipped", "needs a config and files"
        expected = _expected_shapes(self._config, self._reader)
        self._reader.check(expected)
        family = FAMILIES.get(self._config.model_type)
        unused = left_over(self._reader.headers, expected, family) if family else ()
        note = f"; {len(unused)} tensors are no part of the model, such as {unused[0]}" if unused else ""
        return "passed", f"all {len(expected):,} tensors of the config{note}"

    def _check_values(self) -> tuple[Outcome, str]:
        if self._reader is None:
            return "skipped", "needs files"
        headers = self._reader.headers
        with self._progress.task("Reading weights", sum(header.nbytes for header in headers.values())) as advance:
            for name, header in headers.items():
                # Refuses what is not finite; of experts that are packed one is in memory at a time.
                if len(header.shape) > 2:
                    for index in range(header.shape[0]):
                        self._reader.read_part(name, index)
                else:
                    self._reader.read([name])
                advance(header.nbytes)
        return "passed", "every weight is finite"

    def _check_checksums(self) -> tuple[Outcome, str]:
        folder = self._source.folder
        recorded = recorded_checksums(folder)
        self.checksums = weight_checksums(folder, progress=self._progress)
        if recorded is None:
            return "skipped", "no report says what they should be"
        if changed := sorted(name for name, digest in self.checksums.items() if recorded.get(name) != digest):
            return "failed", f"{changed[0]} is not the file that was written ({len(changed)} of {len(recorded)} differ)"
        if absent := sorted(recorded.keys() - self.checksums.keys()):
            return "failed", f"{absent[0]}, which the report names, is absent"
        return "passed", f"{len(recorded)} files are as they were written"

    def _check_tokenizer(self) -> tuple[Outcome, str]:
        if not (self._source.folder / "tokenizer_config.json").is_file():
            return "skipped", "there is none"
        size = len(load_tokenizer(self._source))
        if self._config is not None and size > self._config.vocab_size:
            return "failed", f"{size:,} tokens, but the model has only {self._config.vocab_size:,} embeddings"
        return "passed", f"{size:,} tokens"

    def check_decoding(self, device: torch.device) -> tuple[Outcome, str]:
        """Decode some tokens in every form, against reading them at once."""
        read_config(self._source)
        model = load_model(self._source, dtype="float32", device=device, num_layers=LAYERS)
        self.decoding = found = check_decoding(model)
        return "passed" if found.passed else "failed", found.summary()

    def check_logits(self, request: VerifyRequest, device: torch.device) -> tuple[Outcome, str]:
        """Compare the checkpoint with its source, one of them in memory at a time."""
        assert request.source is not None
        source = open_source(request.source, gguf_file=request.gguf_file, token=request.token)
        shared = check_comparable([source, self._source], window=2, flag="--source")[str(self._source.folder)]
        assert self._config is not None
        length = min(TOKENS, self._config.max_position_embeddings)
        tokenizer = load_tokenizer(source)
        tokens = _texts(tokenizer, length)
        check_known(tokens, vocab_size=self._config.vocab_size)
        said = speak(load_model(source, dtype="float32", device=device), tokens)
        model = load_model(self._source, dtype="float32", device=device)
        self.logits = found = compare_with_source(said, model, tokens, shared)
        if found.knows_nothing:
            return "failed", f"{found.summary()}: no better than a model that knows nothing"
        limit = self._limit()
        if limit is not None and not found.exact_within(limit):
            return "failed", f"{found.summary()}: an exact conversion stays below {limit:g}"
        over = "" if shared.are_all else f", over the {len(shared):,} tokens that both have"
        return "passed", found.summary() + over

    def _profile(self) -> str | None:
        """Return the profile that the conversion's recipe names, if there is one."""
        path = self._source.folder / RECIPE_FILE
        return read_recipe(path).get("profile") if path.is_file() else None

    def _limit(self) -> float | None:
        """Return how far logits may be off, if they are to be the same."""
        folder = self._source.folder
        if (folder / FINETUNE_REPORT_FILE).is_file() or not (folder / REPORT_FILE).is_file():
            return None
        plan = read_report(folder, REPORT_FILE).get("plan")
        if not isinstance(plan, Mapping) or plan.get("method") != "exact":
            return None
        return SAME.get(str(plan.get("dtype")).removeprefix("torch."))


def _texts(tokenizer: PreTrainedTokenizerBase, length: int) -> Int[Tensor, "texts tokens"]:
    """Return short texts of one length; in a context that has no room for a needle, the words of a single sentence."""
    start = text_start(tokenizer)
    try:
        trials = [needle_prompt(tokenizer, length=length, depth=0.5, seed=seed, start=start) for seed in range(TEXTS)]
    except UsageError:
        words = encode_text(_SENTENCE, tokenizer)
        return torch.tensor([(words * length)[first : first + length] for first in range(TEXTS)])
    return torch.tensor([trial.tokens for trial in trials])


def _expected_shapes(config: PreTrainedConfig, reader: CheckpointReader) -> dict[str, torch.Size]:
    """Return what the files must hold for stock transformers to load all of a model."""
    family = FAMILIES.get(config.model_type)
    # Every family that is known, and DeepSeek-V3, has its layers under the same name.
    check_layers(reader.headers, config.num_hidden_layers)
    shapes = Skeleton(config).shapes
    if family is not None:
        return stored_shapes(shapes, family, reader.headers, tied=config.tie_word_embeddings)
    if are_packed(reader.headers):
        return dict(shapes)
    return unpacked_shapes(shapes, ExpertNames())
