"""Documents as token ids, whole and in pieces: how they are trained on and how they are judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from components.shared import batches
from components.shared.encoded import Encoded


def encode(tokenizer: Any, text: str) -> Encoded:
    """Token ids of a document: every token carries loss but the first, which nothing predicts.

    The first is the beginning-of-sequence token where the tokenizer has one; the last says that it ends.
    """
    return next(encode_all(tokenizer, [text]))


def encode_all(tokenizer: Any, texts: Iterable[str]) -> Iterator[Encoded]:
    """`encode` of many documents."""
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    for ids in batches.token_ids(tokenizer, texts):
        whole = [*([] if bos_id is None else [bos_id]), *ids, eos_id]
        yield Encoded(whole[:1], whole[1:])


def pieces(encoded: Encoded, max_length: int, bos_id: int | None) -> list[Encoded]:
    """A document in pieces of at most `max_length` tokens; each of its tokens carries loss in just one.

    What stands first in a piece carries none: the beginning-of-sequence token again, as the model always saw
    it, or without one the last token of the piece before. So the loss summed over the pieces, over the tokens
    of the document, is its mean loss however it was cut, a short tail included.
    """
    body, step = encoded.answer, max_length - 1
    return [
        Encoded([encoded.prompt[0] if bos_id is not None or not at else body[at - 1]], body[at : at + step])
        for at in range(0, len(body), step)
    ]
