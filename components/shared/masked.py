"""Masked language models: an encoder names the tokens hidden from it (arXiv:1810.04805, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import batches, causal, clock, digest, encoders
from components.shared.modelcard import ModelCard
from components.shared.store import Store

# Of the chosen tokens, how many become the mask, and how many some token of the vocabulary; the rest stay.
_MASKED, _RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class Piece:
    """A piece of a document: token ids, of which the first `head` and last `tail` are the tokenizer's own."""

    ids: list[int]
    head: int
    tail: int
    fraction: float

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def terms(self) -> int:
        """How many tokens are hidden: always as many, whichever they are."""
        body = len(self.ids) - self.head - self.tail
        return min(body, max(1, round(self.fraction * body)))


def encode(tokenizer: Any, text: str, fraction: float) -> Piece:
    """A document as one piece, whatever its length."""
    return next(encode_all(tokenizer, [text], fraction))


def encode_all(tokenizer: Any, texts: Iterable[str], fraction: float) -> Iterator[Piece]:
    """`encode` of many documents."""
    empty = tokenizer("")["input_ids"]
    head = min(1, len(empty))
    for body in batches.token_ids(tokenizer, texts):
        yield Piece([*empty[:head], *body, *empty[head:]], head, len(empty) - head, fraction)


def pieces(whole: Piece, max_length: int) -> list[Piece]:
    """A document in pieces of at most `max_length` tokens, each between the tokenizer's own."""
    end = len(whole.ids) - whole.tail
    body, step = whole.ids[whole.head : end], max_length - whole.head - whole.tail
    return [
        Piece(
            [*whole.ids[: whole.head], *body[at : at + step], *whole.ids[end:]],
            whole.head,
            whole.tail,
            whole.fraction,
        )
        for at in range(0, len(body), step)
    ]


def hidden(piece: Piece, mask_id: int, vocabulary: int, generator: Any = None) -> tuple[list[int], list[int]]:
    """Token ids as the model is given them, and the places of the chosen tokens.

    Args:
        piece: of a document.
        mask_id: the token that hides another.
        vocabulary: how many tokens there are.
        generator: of the choice; None: the same choice for the same piece, always.
    """
    import torch

    if generator is None:
        generator = torch.Generator().manual_seed(int(digest.of_value(piece.ids)[:15], 16))
    inner = len(piece) - piece.head - piece.tail
    places = (torch.randperm(inner, generator=generator)[: piece.terms] + piece.head).sort().values.tolist()
    given = list(piece.ids)
    fates = torch.rand(len(places), generator=generator).tolist()
    others = torch.randint(vocabulary, (len(places),), generator=generator).tolist()
    for place, fate, other in zip(places, fates, others, strict=True):
        if fate < _MASKED:
            given[place] = mask_id
        elif fate < _MASKED + _RANDOM:
            given[place] = other
    return given, places


def logits(model: Any, tokenizer: Any, batch: Sequence[Piece], generator: Any = None) -> tuple[Any, Any]:
    """Logits at the hidden tokens, float32 [hidden tokens, vocabulary], and those tokens; in batch order."""
    import torch

    found = [hidden(piece, tokenizer.mask_token_id, len(tokenizer), generator) for piece in batch]
    out = model(**encoders.padded(model, tokenizer, [given for given, _ in found])).logits
    rows = [row for row, (_, places) in enumerate(found) for _ in places]
    columns = [place for _, places in found for place in places]
    targets = [piece.ids[at] for piece, (_, places) in zip(batch, found, strict=True) for at in places]
    return out[rows, columns].float(), torch.tensor(targets, device=out.device)


def open_model(folder: Path, settings: Any = None) -> Any:
    """Load a transformers masked language model from a local folder, in float32 and eval mode."""
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(
        folder, config=settings, local_files_only=True, use_safetensors=True
    )
    return model.float().to(causal.device()).eval()


def load_base(card: ModelCard, store: Store) -> Any:
    """The untuned base of a model, in eval mode; one without a head for masks gets a new one."""
    return open_model(card.base_model.folder(store))


def nats(
    model: Any, tokenizer: Any, batches: Sequence[Sequence[Piece]], done: Any = lambda count: None
) -> list[tuple[float, int]]:
    """Of each piece, the summed nats of its hidden tokens, and how many of them were named right."""
    import torch

    found = []
    for batch in batches:
        with clock.arithmetic(), torch.inference_mode():
            scores, targets = logits(model, tokenizer, batch)
            losses = torch.nn.functional.cross_entropy(scores, targets, reduction="none").cpu()
            right = (scores.argmax(-1) == targets).cpu()
        sizes = [piece.terms for piece in batch]
        for part, named in zip(losses.split(sizes), right.split(sizes), strict=True):
            found.append((float(part.double().sum()), int(named.sum())))
        done(len(batch))
    return found
