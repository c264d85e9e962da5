"""Metrics of scores, entities, retrieval and several tasks, each against a reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.evaluate import baselines, retrieval, score_metrics, several, span_metrics, spans
from components.shared import tagging
from components.shared.errors import TuneyardError
from components.shared.heads import Head, Scale


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
@settings(max_examples=40)
def test_scores_are_those_of_scikit_learn_and_scipy(pairs):
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    truth, said = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    found = score_metrics.score(truth, said)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, said))
    assert found["rmse"] == pytest.approx(root_mean_squared_error(truth, said))
    if np.ptp(truth) == 0 or np.ptp(said) == 0:
        assert found["pearson"] is None and found["spearman"] is None
        return
    assert found["r2"] == pytest.approx(r2_score(truth, said))
    assert found["pearson"] == pytest.approx(pearsonr(truth, said)[0], abs=1e-9)
    # Small whole numbers: many ties, which share the mean of their ranks.
    assert found["spearman"] == pytest.approx(spearmanr(truth, said)[0], abs=1e-9)


def test_intervals_of_scores_hold_their_metric():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=200)
    found = score_metrics.score(truth, truth + generator.normal(size=200))
    for name in ("mae", "rmse"):
        low, high = found["intervals"][name]
        assert low < found[name] < high and high - low < 0.4


def chunks(tags):
    """(start, end, label) of each chunk, one tag at a time: the CoNLL definition written plainly."""
    found, open_at = [], None
    for at, tag in enumerate([*tags, "O"]):
        label = tag[2:]
        if open_at is not None and (tag[0] != "I" or label != open_at[1]):
            found.append((open_at[0], at, open_at[1]))
            open_at = None
        if tag[0] == "B" or (tag[0] == "I" and open_at is None):
            open_at = (at, label)
    return set(found)


TAGS = st.lists(st.sampled_from(["O", "O", "B-x", "I-x", "B-y", "I-y"]), min_size=1, max_size=12)


@given(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=6))
@settings(max_examples=80)
def test_entity_metrics_are_conlls(texts):
    truth, said, right, given_, wanted = [], [], [], [], []
    for actual, predicted in texts:
        size = min(len(actual), len(predicted))
        words = [tagging.Word(i, i, i, i + 1) for i in range(size)]
        truth.append(tagging.spans(words, actual[:size]))
        said.append(tagging.spans(words, predicted[:size]))
        a, b = chunks(actual[:size]), chunks(predicted[:size])
        assert {(s.start, s.end, s.label) for s in truth[-1]} == a
        right, given_, wanted = right + list(a & b), given_ + list(b), wanted + list(a)
    found = span_metrics.score(truth, said)

    def rate(one, other):
        return len(one) / len(other) if other else 0.0

    precision, recall = rate(right, given_), rate(right, wanted)
    assert found["entity_precision"] == precision and found["entity_recall"] == recall
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    assert found["entity_f1"] == pytest.approx(f1)
    for row in found["per_class"]:
        ours = [span for span in right if span[2] == row["label"]]
        assert row["recall"] == rate(ours, [span for span in wanted if span[2] == row["label"]])
        assert row["precision"] == rate(ours, [span for span in given_ if span[2] == row["label"]])


def test_the_dictionary_takes_the_longest_and_no_part_of_a_word():
    train = [
        {"text": "Acme and Acme Holdings", "entities": [{"start": 9, "end": 22, "label": "GROUP"}]},
        {"text": "Acme 黄某某", "entities": [{"start": 0, "end": 4, "label": "FIRM"}]},
        {"text": "Acme 黄某某", "entities": [{"start": 5, "end": 8, "label": "PERSON"}]},
    ]
    known = spans.dictionary(train)
    assert known == {"Acme Holdings": "GROUP", "Acme": "FIRM", "黄某某": "PERSON"}
    text = "Acme Holdings, Acme; Acmeist 与黄某某在"
    found = [(text[s.start : s.end], s.label) for s in spans.looked_up(text, known)]
    assert found == [("Acme Holdings", "GROUP"), ("Acme", "FIRM"), ("黄某某", "PERSON")]
    assert spans.looked_up(text, {}) == []


def test_a_text_as_near_as_the_right_one_stands_before_it():
    similar = np.array([[0.9, 0.5, 0.5], [0.1, 0.2, 0.3], [0.7, 0.7, 0.7], [0.2, 0.9, 0.4]])
    wanted = [{0}, {0}, {1}, {2, 1}]
    assert retrieval.standing(similar, wanted) == [1, 3, 3, 1]
    found = retrieval.score([1, 3, 3, 12])
    assert (found["recall_at_1"], found["recall_at_10"]) == (0.25, 0.75)
    assert found["mrr"] == pytest.approx((1 + 2 / 3 + 1 / 12) / 4)


def test_the_pool_holds_each_text_once_and_an_anchor_all_that_belongs_to_it():
    rows = [
        {"anchor": "a", "positive": "p", "negative": "n"},
        {"anchor": "a", "positive": "q"},
        {"anchor": "b", "positive": "p", "negative": "q"},
    ]
    exam = retrieval.prepare(rows)
    assert exam.anchors == ["a", "b"] and exam.pool == ["p", "n", "q"]
    assert exam.wanted == [{0, 2}, {0}]


def test_tfidf_finds_the_text_that_shares_words():
    pool = ["the rent is due", "oil output fell", "wheat was shipped"]
    similar = baselines.tfidf_similarity(pool, ["who pays rent", "oil prices"], pool)
    assert similar.argmax(1).tolist() == [0, 1] and similar.shape == (2, 3)


HEADS = [Head(task="mood", labels=["+", "-"]), Head(task="price", scale=Scale(mean=20.0, deviation=5.0))]


def test_a_task_is_scored_by_its_kind_and_each_counts_once():
    mood = [{"task": "mood", "label": label} for label in "++-+"]
    price = [{"task": "price", "label": str(label)} for label in (10, 20, 30)]
    one = several._score(HEADS[0], mood, ["+", "+", "-", "-"])
    # F1 of + is 4/5, of - 2/3.
    assert one["score"] == one["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2) and one["accuracy"] == 0.75
    other = several._score(HEADS[1], price, several._spoken(HEADS[1], np.array([[-2.0], [1.0], [2.0]])))
    assert other["score"] == 1.0 and other["mae"] == pytest.approx((0 + 5 + 0) / 3)
    constant = several._score(HEADS[1], price, [20.0] * 3)
    assert constant["score"] == 0.0 and constant["spearman"] is None
    over_all = several._over_all([one, other])
    assert over_all["mean_score"] == pytest.approx((one["score"] + 1) / 2)
    assert over_all["worst_score"] == one["score"]


def test_a_task_or_label_that_the_model_does_not_know_is_an_error():
    origin = {"file": "corpus.jsonl", "line": 4}
    rows = [
        {"task": "topic", "label": "oil", "origin": origin},
        {"task": "mood", "label": "?", "origin": origin},
        {"task": "price", "label": "31", "origin": origin},
    ]
    with pytest.raises(TuneyardError) as raised:
        several.refuse_unknown(rows, HEADS)
    assert "task 'topic' (corpus.jsonl:4), mood '?' (corpus.jsonl:4); its tasks" in str(raised.value)
