"""InfoNCE by its formula; cached gradients are those of one batch, with the dropout of its own pass."""

from __future__ import annotations

import math

import pytest
import torch

from components.train.config import TrainConfig
from components.train.objectives import infonce
from components.train.objectives.config import ContrastiveObjective
from components.train.objectives.contrastive import Contrastive
from components.train.ranks import ALONE
from components.train.update import autocast, gradients

ORIGIN = {"file": "corpus.jsonl", "line": 7, "part": "main"}


def pairs(count):
    return [
        {"id": str(i), "origin": ORIGIN, "anchor": f"the rent {i}", "positive": f"profit rose {i} mln"}
        | ({"negative": f"losses {i}"} if i % 3 == 0 else {})
        for i in range(count)
    ]


@pytest.fixture
def contrastive(tiny_encoder):
    def make(dropout=0.0, **settings):
        torch.manual_seed(0)
        return Contrastive(tiny_encoder, ContrastiveObjective(kind="contrastive", **settings), dropout)

    return make


def by_hand(anchors, candidates, belongs, temperature):
    """van den Oord et al. 2018, equation 4, an anchor at a time in float64."""
    total = 0.0
    for i, anchor in enumerate(anchors):
        scores = [
            math.exp(float(anchor @ c) / temperature)
            for j, c in enumerate(candidates)
            if j == i or not belongs(i, j)
        ]
        total -= math.log(math.exp(float(anchor @ candidates[i]) / temperature) / sum(scores))
    return total


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_is_the_formula(symmetric):
    torch.manual_seed(0)
    anchors, positives, negatives = unit(5, 8), unit(5, 8), unit(3, 8)
    keys = [torch.arange(5), torch.arange(10, 15), torch.arange(20, 23)]
    found = float(infonce.summed([anchors, positives, negatives], keys, 0.1, symmetric))
    nothing = lambda i, j: False  # noqa: E731
    expected = by_hand(anchors, torch.cat([positives, negatives]), nothing, 0.1)
    if symmetric:
        expected = (expected + by_hand(positives, anchors, nothing, 0.1)) / 2
    # Ours is computed in float32.
    assert found == pytest.approx(expected, rel=1e-5)


def test_cosines_are_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    vectors = [unit(6, 16).float(), unit(6, 16).float(), unit(0, 16).float()]
    keys = [torch.arange(6), torch.arange(6, 12), torch.arange(0)]
    exact = float(infonce.summed(vectors, keys, 0.02, False))
    with autocast("bfloat16"):
        assert float(infonce.summed(vectors, keys, 0.02, False)) == exact


def test_what_belongs_to_an_anchor_is_not_its_negative():
    torch.manual_seed(0)
    # Pairs 0 and 1 have one positive; 2 and 3 one anchor; the negative is pair 4's own positive; the anchor
    # of pair 4 is the positive of pair 0.
    keys = [torch.tensor([0, 1, 2, 2, 10]), torch.tensor([10, 10, 12, 13, 14]), torch.tensor([14])]
    names = {key: unit(8) for side in keys for key in side.tolist()}
    vectors = [torch.stack([names[key] for key in side.tolist()]) for side in keys]
    found = float(infonce.summed(vectors, keys, 0.1, False))
    taken_out = {(0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (4, 0), (4, 1)}
    candidates = torch.cat(vectors[1:])
    expected = by_hand(vectors[0], candidates, lambda i, j: (i, j) in taken_out, 0.1)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found < by_hand(vectors[0], candidates, lambda i, j: False, 0.1) - 0.1


def test_vectors_are_means_over_a_texts_own_tokens_at_length_one(contrastive):
    made = contrastive()
    encoded = [made.encode(row) for row in pairs(4)]
    with torch.no_grad():
        anchors, positives, negatives = made._vectors(encoded)
        assert len(anchors) == len(positives) == 4 and len(negatives) == 2
        for vector, one in zip(anchors, encoded, strict=True):
            hidden = made.model(torch.tensor([one.anchor])).last_hidden_state[0]
            torch.testing.assert_close(vector, hidden.mean(0) / hidden.mean(0).norm(), rtol=1e-4, atol=1e-6)


def keys_of(encoded):
    """A number for each different text, by side."""
    negatives = [e.negative for e in encoded if e.negative is not None]
    sides = [[e.anchor for e in encoded], [e.positive for e in encoded], negatives]
    seen = {}
    return [torch.tensor([seen.setdefault(tuple(ids), len(seen)) for ids in side]) for side in sides]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cached_gradients_are_those_of_autograd_through_all_micro_batches_at_once(contrastive, dropout):
    gradients_of = {}
    for cached in (True, False):
        made = contrastive(dropout, symmetric=True)
        made.model.train()
        encoded = [made.encode(row) for row in pairs(7)]
        micros = [encoded[:3], encoded[3:4], encoded[4:]]
        torch.manual_seed(5)
        if cached:
            made.gradient(micros, 7, 0.0, lambda: autocast("float32"), ALONE)
        else:
            parts = [made._vectors(micro) for micro in micros]
            vectors = [torch.cat([part[side] for part in parts]) for side in range(3)]
            (infonce.summed(vectors, keys_of(encoded), 0.05, True) / 7).backward()
        gradients_of[cached] = {n: w.grad for n, w in made.model.named_parameters() if w.grad is not None}
        # What comes after draws the same numbers either way.
        gradients_of[cached]["random"] = torch.rand(3)
    assert gradients_of[True].keys() == gradients_of[False].keys()
    for name, gradient in gradients_of[False].items():
        torch.testing.assert_close(gradients_of[True][name], gradient, rtol=1e-4, atol=1e-6)


def test_more_micro_batches_mean_more_negatives(contrastive):
    made = contrastive()
    config = TrainConfig(objective="contrastive", base_model="tiny", adapter="full", precision="float32")
    encoded = [made.encode(row) for row in pairs(8)]
    few = sum(
        gradients(made, [[e] for e in encoded[i : i + 2]], config, "float32")["loss"] for i in (0, 2, 4, 6)
    )
    many = gradients(made, [[e] for e in encoded], config, "float32")["loss"]
    # Near-equal vectors of a random model: the loss is about the log of the number of candidates.
    assert many > few / 4 + 0.5


def test_eval_is_judged_against_all_of_eval_however_it_is_cut(contrastive):
    made = contrastive()
    encoded = [made.encode(row) for row in pairs(9)]
    with torch.inference_mode():
        whole = float(made.summed_loss(encoded, 0.0))
        cut = made.judged_loss(encoded, [[8, 1], [0, 2, 3, 4], [5], [6, 7]], ALONE)
    assert cut == pytest.approx(whole, rel=1e-5)
