"""What encoders say of a text, in training, when it is judged and in service alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.shared import causal, prompts, window
from components.shared.errors import TuneyardError

# oneDNN keeps a kernel of every product for each length it meets (12 MiB a length for MiniLM), and freed
# blocks of one length seldom fit the next. With few lengths memory stops growing, for under 16 columns.
_LENGTHS_OF = 16


def columns_of(names: Mapping[int, str], labels: Sequence[str]) -> list[int]:
    """Which output of a classifier each label is, by name.

    Args:
        names: its config's id2label.
        labels: that are asked for; it may know more.

    Raises:
        TuneyardError: it has no output of some name.
    """
    known = {str(name): int(at) for at, name in names.items()}
    missing = [label for label in labels if label not in known]
    if missing:
        raise TuneyardError(
            f"the teacher does not know the labels {missing}; it knows {sorted(known)}",
            "label the corpus as the teacher does, or choose a teacher that was trained on these labels",
        )
    return [known[label] for label in labels]


def padded(model: Any, tokenizer: Any, batch: Sequence[Sequence[int]]) -> Mapping[str, Any]:
    """Tensors of a batch of token ids, on the device.

    Args:
        model: that reads them; a batch is not made longer than its window, in which a soft prompt is too.
        tokenizer: its tokenizer.
        batch: token ids of each text.

    Returns:
        What the tokenizer gives with `input_ids`, each [texts, columns], padded on the right: the columns are
        the tokens of the longest text, rounded up.
    """
    longest = max(map(len, batch))
    prompt = prompts.of(model)
    most = (window.of_model(model) or longest) - (prompt.tokens if prompt is not None else 0)
    columns = max(longest, min(-(-longest // _LENGTHS_OF) * _LENGTHS_OF, most))
    lists = {"input_ids": [list(ids) for ids in batch]}
    # On the right, whatever the tokenizer's own side: what is read at a token counts from the left.
    made = tokenizer.pad(
        lists, padding="max_length", max_length=columns, padding_side="right", return_tensors="pt"
    )
    return made.to(causal.device())


def mean_pooled(hidden: Any, mask: Any) -> Any:
    """The mean over a text's own tokens of its last hidden states.

    Args:
        hidden: [texts, longest, width].
        mask: [texts, longest], 1 at tokens and 0 at padding.

    Returns:
        float32 [texts, width].
    """
    weights = mask[:, :, None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)


def unit_pooled(hidden: Any, mask: Any) -> Any:
    """`mean_pooled` at length one, so that a product of two is the cosine of their angle."""
    import torch

    return torch.nn.functional.normalize(mean_pooled(hidden, mask), dim=-1)
