"""Many texts as token ids at once: by the tokenizer's own threads, and without what nobody asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

# Texts that are held at once, with all that the tokenizer makes of them.
_TEXTS = 1000


def token_ids(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    """The token ids of each text, without special tokens: just what `tokenizer(text)` gives for it.

    A tokenizer written in Rust takes them in batches, over all cores, and keeps no offsets into the text.
    Where there is none, or it is set to cut or pad, each text goes the usual way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation is not None or backend.padding is not None:
        for text in texts:
            yield list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return
    rest = iter(texts)
    while batch := list(islice(rest, _TEXTS)):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            yield encoding.ids
