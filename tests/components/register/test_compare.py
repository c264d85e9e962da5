from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from components.register.compare import Judged, compare, incomparable
from components.register.config import BETTER, RegisterConfig

ON = {
    "test": "t",
    "left_out": "l",
    "task": "causal-lm",
    "base_model": "b",
    "answered": 32,
    "max_new_tokens": 256,
}
metrics = st.sampled_from(sorted(BETTER))
finite = st.floats(allow_nan=False, allow_infinity=False)
wild = st.one_of(
    st.sampled_from([None, math.nan, math.inf, -math.inf, True, "1"]), st.floats(), st.integers(), finite
)


def judged(version, metric, value, **changes):
    return Judged(version, f"digest-{version}", {metric: value}, ON | changes)


@given(metrics, finite, finite)
def test_the_champion_is_replaced_exactly_when_the_new_one_is_not_worse(metric, new, old):
    found = compare(metric, judged(2, metric, new), judged(1, metric, old))
    assert found.promote == (new <= old if BETTER[metric] == "lower" else new >= old)
    assert (found.candidate, found.champion, found.champion_version, found.comparable) == (new, old, 1, True)
    # Of two models one may replace the other, both only when they are equal.
    back = compare(metric, judged(1, metric, old), judged(2, metric, new))
    assert found.promote or back.promote
    assert (found.promote and back.promote) == (new == old)


@settings(max_examples=300, deadline=None)
@given(metrics, wild, wild)
def test_what_is_no_number_never_wins(metric, new, old):
    found = compare(metric, judged(2, metric, new), judged(1, metric, old))
    numbers = all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in (new, old)
    )
    assert numbers or not found.promote


@given(metrics, finite, finite)
def test_another_test_set_is_not_compared_and_said(metric, new, old):
    found = compare(metric, judged(2, metric, new, test="grown"), judged(1, metric, old))
    assert not found.promote and found.comparable is False
    assert "champion version 1 was judged on another test set" in found.why


def test_no_champion_and_the_same_model_need_no_numbers():
    new = Judged(2, "d", {}, {})
    assert compare("loss", new, None).promote
    same = compare("loss", new, Judged(1, "d", {}, {"test": "other"}))
    assert same.promote and same.comparable is None and "same model" in same.why


@pytest.mark.parametrize(
    ("metric", "change", "said"),
    [
        ("loss", {"base_model": "x"}, ["base model (its tokens are not the same)"]),
        ("loss_reduction", {"base_model": "x"}, ["base model (its tokens are not the same)"]),
        ("rouge_l", {"base_model": "x"}, []),
        ("loss", {"answered": 64}, []),
        ("rouge_l", {"answered": 64}, ["number of answers"]),
        ("bleu", {"max_new_tokens": 9, "test": "x"}, ["test set", "length of answers"]),
        ("accuracy", {"answered": 64, "base_model": "x"}, []),
        ("accuracy", {"left_out": "x"}, ["part of it"]),
        ("accuracy", {"task": "classification"}, ["task"]),
    ],
)
def test_what_must_be_the_same_depends_on_the_metric(metric, change, said):
    assert incomparable(metric, ON, ON | change) == said


def test_a_metric_that_models_are_not_compared_by_is_refused_with_the_near_one():
    with pytest.raises(ValidationError, match="did you mean 'rouge_l'"):
        RegisterConfig(compare_by="rougel")
    with pytest.raises(ValidationError, match="latency_p50_ms"):
        RegisterConfig(compare_by="latency_p50_ms")
    assert RegisterConfig(compare_by="auc").compare_by == "auc"


@pytest.mark.parametrize("name", ["a/b", "", "a b", ".hidden", "x" * 101])
def test_a_name_that_would_not_fit_everywhere_is_refused(name):
    with pytest.raises(ValidationError, match="name"):
        RegisterConfig(name=name)
