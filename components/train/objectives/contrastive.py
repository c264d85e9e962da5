"""Vectors for texts: what belongs together comes near, what else is in the update goes away.

The loss of a pair depends on the other pairs of its update, so k micro-batches are no single batch as such.
Gradient caching (Gao et al. 2021, arXiv:2101.06983, section 3) makes them one: every text is embedded without
gradients, the loss over the whole update gives the gradient of each vector, and a second forward pass of each
micro-batch carries that into the weights. It costs a third more arithmetic and hardly any memory; an update
of one micro-batch does without. So all pairs of an update are each other's negatives, however it is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal, clock, digest, encoders
from components.shared.tasks import Task
from components.train import checkpoint
from components.train.objectives import infonce, texts
from components.train.objectives.base import Arithmetic, Objective, base_settings
from components.train.objectives.config import ContrastiveObjective
from components.train.ranks import Ranks


@dataclass(frozen=True)
class Pair:
    """Token ids of an anchor, of what belongs to it, and of what does not though it looks like it, if any."""

    anchor: list[int]
    positive: list[int]
    negative: list[int] | None

    @property
    def texts(self) -> list[list[int]]:
        """Its two or three texts."""
        return [self.anchor, self.positive, *([] if self.negative is None else [self.negative])]

    def __len__(self) -> int:
        # max_length is that of a text, not of a pair.
        return max(map(len, self.texts))


class Contrastive(Objective):
    """InfoNCE with the pairs of the update as negatives: see ContrastiveObjective."""

    task: Task = "embedding"

    def __init__(self, folder: Path, settings: ContrastiveObjective, dropout: float | None = None) -> None:
        from transformers import AutoModel

        self._settings = settings
        # Similarities, each rounded, are divided by the temperature; at 0.05 the loss moves no further than
        # others do (MiniLM in bfloat16: 0.3%, and 1.7% at 0.01).
        self.rounding = max(1.0, 0.05 / settings.temperature)
        self.tokenizer = texts.open_tokenizer(folder)
        self.model = AutoModel.from_pretrained(
            folder, config=base_settings(folder, dropout), local_files_only=True, use_safetensors=True
        ).to(causal.device())
        # A text's vector is the mean over its tokens: what BERT pools besides has no part in the loss.
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None

    def encode(self, example: Mapping[str, Any]) -> Pair:
        """See Objective; its length is that of its longest text."""
        negative = example.get("negative")
        return Pair(
            texts.token_ids(self.tokenizer, example["anchor"]),
            texts.token_ids(self.tokenizer, example["positive"]),
            texts.token_ids(self.tokenizer, negative) if negative else None,
        )

    def shorten(self, encoded: Pair, max_length: int) -> Pair | None:
        """Cut the end of each text that is too long."""
        anchor, positive, *negative = [texts.cut(self.tokenizer, t, max_length) for t in encoded.texts]
        return Pair(anchor, positive, negative[0] if negative else None)

    def terms(self, encoded: Pair) -> int:
        """One pair."""
        return 1

    def _vectors(self, pairs: Sequence[Pair]) -> tuple[Any, Any, Any]:
        """Unit vectors [texts, width] of the anchors, the positives and the negatives there are."""
        columns = _columns(pairs)
        inputs = encoders.padded(self.model, self.tokenizer, [ids for column in columns for ids in column])
        hidden = self.model(**inputs).last_hidden_state
        vectors = encoders.unit_pooled(hidden, inputs["attention_mask"])
        anchors, positives, negatives = vectors.split([len(column) for column in columns])
        return anchors, positives, negatives

    def _loss(self, vectors: Sequence[Any], keys: Sequence[Any]) -> Any:
        """Loss summed over pairs; vectors and keys are those of anchors, positives and negatives."""
        return infonce.summed(vectors, keys, self._settings.temperature, self._settings.symmetric)

    def summed_loss(self, batch: Sequence[Pair], label_smoothing: float) -> Any:
        """Loss with the batch's own pairs as negatives; there are no labels to smooth."""
        return self._loss(self._vectors(batch), _keys(batch))

    def gradient(
        self,
        micros: Sequence[Sequence[Any]],
        terms: int,
        label_smoothing: float,
        arithmetic: Arithmetic,
        ranks: Ranks,
    ) -> float:
        """See Objective, and the module for how micro-batches and processes make one batch."""
        import torch

        if ranks.count == 1 and len(micros) == 1:
            return super().gradient(micros, terms, label_smoothing, arithmetic, ranks)
        with clock.arithmetic():
            states, parts = [], []
            for micro in micros:
                states.append(checkpoint.random_state())
                with torch.no_grad(), arithmetic():
                    parts.append(self._vectors(micro))
            nothing = torch.zeros(0, self.model.config.hidden_size, device=causal.device())
            ours = [torch.cat([nothing, *(part[side] for part in parts)]) for side in range(3)]
            gathered = [ranks.gathered(vectors) for vectors in ours]
            keys = [ranks.gathered(keys)[0] for keys in _keys([pair for micro in micros for pair in micro])]
            vectors = [every.requires_grad_() for every, _ in gathered]
            loss = self._loss(vectors, keys) / terms
            slopes = torch.autograd.grad(loss, vectors, allow_unused=True, materialize_grads=True)
            at = [start for _, start in gathered]
            for micro, state, part in zip(micros, states, parts, strict=True):
                with _replayed(state), arithmetic():  # the dropout that made the vectors
                    again = torch.cat(self._vectors(micro))
                ends = [a + len(side) for a, side in zip(at, part, strict=True)]
                slope = torch.cat([s[a:end] for s, a, end in zip(slopes, at, ends, strict=True)])
                again.backward(slope.to(again.dtype))
                at = ends
        return float(loss.detach()) / ranks.count

    def judged_loss(self, encoded: Sequence[Any], batches: Iterable[Sequence[int]], ranks: Ranks) -> float:
        """With all of eval as negatives, so that the number does not hang on how eval was cut."""
        import torch

        micros = [[encoded[i] for i in batch] for batch in batches]
        parts = [self._vectors(micro) for micro in micros]
        vectors = [torch.cat([part[side] for part in parts]) for side in range(3)]
        return float(self._loss(vectors, _keys([pair for micro in micros for pair in micro]))) / ranks.count


def _columns(pairs: Sequence[Pair]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Token ids of the anchors, the positives and the negatives there are."""
    negatives = [pair.negative for pair in pairs if pair.negative is not None]
    return [pair.anchor for pair in pairs], [pair.positive for pair in pairs], negatives


def _keys(pairs: Sequence[Pair]) -> list[Any]:
    """A number for each text of `_columns`, the same for the same tokens in any process."""
    import torch

    columns = _columns(pairs)
    numbers = [[int(digest.of_value(ids)[:15], 16) for ids in column] for column in columns]
    return [torch.tensor(column, dtype=torch.int64, device=causal.device()) for column in numbers]


@contextmanager
def _replayed(state: Mapping[str, Any]) -> Iterator[None]:
    """Go back to a random state (checkpoint.random_state), and afterwards on from where it was."""
    import torch

    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if "cuda" in state else []):
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])
        yield
