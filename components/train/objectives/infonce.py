"""The loss of contrastive learning over unit vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def summed(vectors: Sequence[Any], keys: Sequence[Any], temperature: float, symmetric: bool) -> Any:
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, equation 4), summed over the pairs.

    Of anchor i it is the cross-entropy of finding positive i among all positives and negatives, by cosine
    over temperature. What belongs to anchor i as well (a positive of an equal anchor, the same text once
    more) or is its very text is taken out: pushing it away would undo what its own pair learns.

    Args:
        vectors: of anchors [n, width], positives [n, width] and hard negatives [m, width], of length one.
        keys: [n], [n] and [m] numbers, equal where the texts are.
        temperature: divides the cosines.
        symmetric: the mean with the other direction, of finding anchor i for positive i.

    Returns:
        float32 scalar, in nats.
    """
    import torch

    anchors, positives, negatives = (side.float() for side in vectors)
    anchor_keys, positive_keys, negative_keys = keys
    targets = torch.arange(len(anchors), device=anchors.device)
    own = targets[:, None] == torch.arange(len(anchors) + len(negatives), device=anchors.device)
    candidate_keys = torch.cat([positive_keys, negative_keys])
    # [n, n + m]: some anchor equal to i has a positive equal to candidate j.
    alike = (anchor_keys[:, None] == anchor_keys).float()
    belongs = alike @ (positive_keys[:, None] == candidate_keys).float() > 0
    taken_out = (belongs | (anchor_keys[:, None] == candidate_keys)) & ~own
    # In bfloat16 a cosine is off by up to 0.004, a twelfth of a usual temperature.
    with torch.autocast(anchors.device.type, enabled=False):
        logits = anchors @ torch.cat([positives, negatives]).T / temperature
    loss = torch.nn.functional.cross_entropy(
        logits.masked_fill(taken_out, -torch.inf), targets, reduction="sum"
    )
    if not symmetric:
        return loss
    count = len(anchors)
    back = logits[:, :count].T.masked_fill(taken_out[:, :count].T, -torch.inf)
    return (loss + torch.nn.functional.cross_entropy(back, targets, reduction="sum")) / 2
