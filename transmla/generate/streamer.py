"""Text as it comes: token after token into pieces that can be shown at once, and together are the decoded whole.

A token alone may be half a character, or lose the space before it. So each piece is the difference between two decoded
stretches that begin at the same token, a few tokens back, and is held while it ends in half a character.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

_HALF_A_CHARACTER = "\ufffd"


class TextPieceStreamer(BaseStreamer):
    """Hand each piece of one sequence to ``write`` and keep the time of every token, in seconds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._tokens: list[int] = []
        self._start = self._shown = 0
        self._seen_prompt = False
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first and is not shown, or new tokens."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self._tokens += value.flatten().tolist()
        self.times.append(time.perf_counter())
        self._show(whole=False)

    def end(self) -> None:
        """Show what has been held."""
        self._show(whole=True)

    def _show(self, *, whole: bool) -> None:
        before, now = self._decode(self._start, self._shown), self._decode(self._start, None)
        if len(now) <= len(before) or (now.endswith(_HALF_A_CHARACTER) and not whole):
            return
        self._write(now[len(before) :])
        self._start, self._shown = self._shown, len(self._tokens)

    def _decode(self, start: int, end: int | None) -> str:
        # Tidying would change what has been shown already.
        return self._tokenizer.decode(
            self._tokens[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
