"""Documents as token ids, whole and in pieces: how they are trained on and how they are judged."""

from __future__ import annotations

from typing import Any

from components.shared.encoded import Encoded


def encode(tokenizer: Any, text: str) -> Encoded:
    """Token ids of a document: every token carries loss but the first, which nothing predicts.

    The first is the beginning-of-sequence token where the tokenizer has one; the last says that it ends.
    """
    bos_id = tokenizer.bos_token_id
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = [*([] if bos_id is None else [bos_id]), *ids, tokenizer.eos_token_id]
    return Encoded(whole[:1], whole[1:])


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
