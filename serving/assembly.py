"""From token ids to text that may be sent: whole characters only, and nothing after a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Assembly:
    """The text of one answer in the making.

    Args:
        tokenizer: decodes.
        stops: strings that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._context, self._read = 0, 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that can be sent now, often empty for half a character."""
        self._ids.append(token)
        new = self._decode_new()
        return "" if new.endswith(_INCOMPLETE) else self._release(self._take(new))

    def finish(self) -> str:
        """What is left at the end: text held back, and characters that never became whole."""
        if self.stopped:
            return ""
        text = self._release(self._take(self._decode_new()))
        rest, self._held = self._held, ""
        return text + rest

    def _decode_new(self) -> str:
        # Decoded with the tokens just before it: whether a piece begins with a space depends on them.
        before = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _take(self, new: str) -> str:
        self._context, self._read = self._read, len(self._ids)
        return new

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
