"""The judge itself: it measures what it says, and no number slips through it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.compress import proof
from components.compress.proof import Gap, Proof

GOOD = Proof(Gap(1e-5, 0, 1), Gap(3, 0.1, 0.9), Gap(3, 0.1, 0.9), 4, (), (), (), 300, "float32")


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), scale=st.floats(0, 20))
def test_a_gap_is_zero_to_itself_and_never_negative(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(5, 11, generator=generator) * scale for _ in range(2))
    assert proof.compare([a], [a]) == Gap(0, 0, 1)
    gap = proof.compare([a], [b])
    assert gap.kl_nats >= 0 and gap.max_difference == float((a - b).abs().max())
    # A constant added to all logits of a token changes no distribution.
    assert proof.compare([a], [a + 3]).kl_nats == pytest.approx(0, abs=1e-5)


def test_divergence_is_the_textbooks():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    by_hand = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert proof.compare([p.log()], [q.log()]).kl_nats == pytest.approx(by_hand, abs=1e-6)


def test_a_proof_in_order_has_no_faults():
    assert proof.faults(GOOD, 0.05) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"exported_adapted": Gap(0.06, 0, 1)}, "more than max_logit_difference"),
        ({"exported_adapted": Gap(math.nan, 0, 1)}, "more than max_logit_difference"),
        ({"adapted_base": Gap(5e-4, 0, 1)}, "the export is the base model"),
        ({"adapted_base": Gap(math.nan, 0, 1)}, "the export is the base model"),
        ({"exported_base": Gap(0, 0, 1)}, "the export is the base model"),
        ({"exported_adapted": Gap(0.04, 0, 1), "adapted_base": Gap(0.1, 0, 1)}, "not a tenth"),
        ({"unmoved": ("a", "b", "c", "d")}, "4 of 4 tuned tensors equal the base: a, b, c and 1 more"),
        ({"strayed": ("norm",)}, "norm"),
        ({"damaged": ("norm",)}, "on disk"),
    ],
)
def test_each_fault_is_found(change, fault):
    found = proof.faults(replace(GOOD, **change), 0.05)
    assert len(found) == 1 and fault in found[0]


@pytest.mark.parametrize(("kl_nats", "found"), [(0.0009, 0), (0.0011, 1), (math.nan, 1)])
def test_rounding_may_cost_a_hundredth_of_what_the_tuning_moved(kl_nats, found):
    # Some logit differs by more than max_logit_difference, which bounds arithmetic and not rounding.
    rounded = replace(GOOD, storage="bfloat16", exported_adapted=Gap(0.4, kl_nats, 1))
    assert len(proof.faults(rounded, 0.05)) == found


def test_nan_logits_are_an_infinite_gap():
    a, b = torch.zeros(2, 3), torch.tensor([[0, 0, 0], [0, math.nan, 0]])
    assert proof.compare([a], [b]).max_difference == math.inf


def test_a_digest_sees_one_bit_and_not_the_storage_type():
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    before = proof.digests(model)
    assert proof.digests(model.float()) == before
    model.weight.data.view(torch.int32)[1, 2] ^= 1
    assert proof.differing(before, proof.digests(model)) == {"weight"}
    assert proof.differing(before, {"weight": before["weight"]}) == {"bias"}
