"""Drift: the index against numbers worked out by hand, and how it behaves on samples of one population."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.shared import drift
from components.shared.causal import Encoded


def test_the_index_is_what_the_formula_gives_by_hand():
    # Live 0 and 399: with a half added each, 0.5 / 400 and 399.5 / 400 = 0.00125 and 0.99875.
    # Both differ from a half by 0.49875, which times ln(0.99875 / 0.00125) is 0.49875 * ln 799.
    assert drift.stability_index([0.5, 0.5], [0, 399]) == pytest.approx(0.49875 * math.log(799))
    # (0.2 - 0.1) ln 2 + (0.3 - 0.4) ln 0.75 + (0.5 - 0.5) ln 1: many enough that the halves do not show.
    assert drift.stability_index([0.1, 0.4, 0.5], [200_000, 300_000, 500_000]) == pytest.approx(
        0.09808, abs=1e-4
    )


def test_deciles_hold_a_tenth_each():
    found = drift.reference([*range(1, 101)] * 3)
    assert found.token_edges == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert found.token_shares == pytest.approx([0.1] * 10)
    assert found.label_shares == {}


def test_a_training_is_known_by_its_prompts_and_labels():
    encoded = [Encoded([1] * length, [2] * 50) for length in (3, 3, 9, 9)]
    assert drift.of_training(encoded, [{"prompt": "?"}] * 4) == drift.reference([3, 3, 9, 9])
    texts = [[1] * length for length in (3, 3, 9, 9)]
    rows = [{"label": name} for name in "aaab"]
    assert drift.of_training(texts, rows) == drift.reference([3, 3, 9, 9], ["a", "a", "a", "b"])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=200))
def test_no_bin_of_a_reference_is_empty(counts):
    found = drift.reference(counts, ["a", "b"])
    assert len(found.token_shares) == len(found.token_edges) + 1
    assert min(found.token_shares) > 0
    assert sum(found.token_shares) == pytest.approx(1)
    assert sorted(set(found.token_edges)) == found.token_edges
    assert found.label_shares == {"a": 0.5, "b": 0.5}


def test_nothing_is_said_of_few_requests_or_without_a_reference():
    window = drift.Window(drift.reference([*range(100)]))
    window.observe([5] * (drift.ENOUGH - 1))
    assert window.readings() == {}
    window.observe([5])
    assert window.readings()[drift.PROMPT_TOKENS] > 1
    without = drift.Window(None)
    without.observe([5] * 1000)
    assert without.readings() == {}
    # All prompts alike: one bin, which nothing can leave.
    same = drift.Window(drift.reference([7] * 50))
    same.observe([9] * 1000)
    assert same.readings() == {}


def test_the_same_population_stays_below_a_tenth_and_another_goes_above_a_quarter():
    """With 1000 of 10 bins the mean is 0.011 and the deviation 0.004 (chi-squared): 0.1 is 20 of them off."""
    draw = random.Random(4)
    trained = [round(draw.lognormvariate(4, 0.5)) for _ in range(5000)]
    labels = draw.choices(["acq", "earn", "grain"], [6, 3, 1], k=5000)
    window = drift.Window(drift.reference(trained, labels))
    alike = [round(draw.lognormvariate(4, 0.5)) for _ in range(1000)]
    window.observe(alike, draw.choices(["acq", "earn", "grain"], [6, 3, 1], k=1000))
    assert set(window.readings()) == {drift.PROMPT_TOKENS, drift.LABELS}
    assert max(window.readings().values()) < 0.1
    # The window forgets: a thousand requests later only they count.
    window.observe([2 * n for n in alike], ["grain"] * 1000)
    assert min(window.readings().values()) > 0.25


def test_what_is_kept_of_a_text_is_the_number_of_its_bin():
    window = drift.Window(drift.reference([*range(100)], ["a", "b"]))
    window.observe([41], ["a"])
    assert list(window._tokens) == [4]
