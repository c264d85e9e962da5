"""Split: a side depends on the example alone."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.shared import jsonl
from components.shared.manifest import Manifest
from components.shared.stage import Artifact, Context
from components.split.config import SplitConfig
from components.split.split import SIDES, explained_by_chance, kl_nats, side_of, split


def example(text, part="main", label="a", **extra):
    return {
        "text": text,
        "label": label,
        "id": hashlib.sha256(f"{text}{label}".encode()).hexdigest(),
        "origin": {"file": "corpus.jsonl", "line": 1, "part": part},
        "extra": extra,
    }


def run(rows, tmp_path, **settings_):
    jsonl.write(tmp_path / "in" / "examples.jsonl", rows)
    artifact = Artifact(Manifest("dataset", (), {"dataset_type": "labelled-text"}), tmp_path / "in")
    context = Context("run", "test", "split", "key", None, tmp_path / "out", tmp_path / "work")
    context.out.mkdir()
    result = split(SplitConfig(**settings_), {"examples": artifact}, context)
    return result, {side: list(jsonl.read(context.out / side / "examples.jsonl")) for side in SIDES}


SOURCED = st.tuples(st.integers(0, 30), st.sampled_from("ab"), st.sampled_from("uvwxyz"))
BY = ({"stratify_by": "label"}, {"stratify_by": "author"}, {"group_by": "author"})
SETTINGS = st.sampled_from([{}, *BY, {"group_by": "author", "stratify_by": "label"}])


@given(
    st.lists(SOURCED, max_size=60), st.lists(SOURCED, max_size=30), SETTINGS, st.integers(0, 9), st.randoms()
)
def test_sides_hold_together_and_outlast_growth(tmp_path_factory, old, new, settings_, seed, order):
    """Equal examples and groups are on one side, also where a kept column tells equal examples apart."""

    def divide(numbers):
        rows = [example(f"text {n}", label=label, author=author) for n, label, author in numbers]
        result, sides = run(rows, tmp_path_factory.mktemp("split"), seed=seed, **settings_)
        ids = {side: {row["id"] for row in sides[side]} for side in SIDES}
        authors = {side: {row["extra"]["author"] for row in sides[side]} for side in SIDES}
        for one, other in itertools.combinations(SIDES, 2):
            assert not ids[one] & ids[other]
            assert not ("group_by" in settings_ and authors[one] & authors[other])
        removed = result.summary["removed_as_leak"]
        assert sum(map(len, sides.values())) + removed == len(rows)
        assert not removed or "group_by" in settings_
        return {(r["id"], r["extra"]["author"]): side for side in SIDES for r in sides[side]}, ids

    before, ids_before = divide(old)
    grown = [*old, *new]
    order.shuffle(grown)
    after, ids_after = divide(grown)
    assert all(after.get(row, side) == side for row, side in before.items())
    assert ids_before["test"] <= ids_after["test"]
    if "group_by" not in settings_:
        assert before.keys() <= after.keys()


def test_ratios_hold_within_what_chance_allows():
    n = 4000
    counts = Counter(side_of(example(f"text {i}"), SplitConfig(), False) for i in range(n))
    for side, ratio in zip(SIDES, (0.7, 0.15, 0.15), strict=True):
        # Five standard deviations of a binomial: one false alarm in millions.
        assert abs(counts[side] / n - ratio) < 5 * (ratio * (1 - ratio) / n) ** 0.5


def test_duplicates_and_groups_stay_together(tmp_path):
    rows = [example(f"text {i % 50}", author=f"author {i % 7}") for i in range(300)]
    _, sides = run(rows, tmp_path)
    ids = [{row["id"] for row in sides[side]} for side in SIDES]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    grouped = SplitConfig(group_by="author")
    of_author = {
        a: {side_of(r, grouped, False) for r in rows if r["extra"]["author"] == a}
        for a in ("author 1", "author 5")
    }
    assert all(len(found) == 1 for found in of_author.values())


def test_the_sources_own_test_split_is_kept_and_its_twins_leave_train(tmp_path):
    rows = [example(f"text {i}") for i in range(400)] + [
        example(f"text {i}", part="test") for i in range(395, 450)
    ]
    result, sides = run(rows, tmp_path)
    assert [row["text"] for row in sides["test"]] == [f"text {i}" for i in range(395, 450)]
    assert not {r["id"] for r in sides["test"]} & {r["id"] for s in ("train", "eval") for r in sides[s]}
    assert result.summary["removed_as_leak"] == 5
    assert result.summary["kl_nats"]["length"]["test"] is None and "kl_length_test" not in result.metrics
    page = result.page.read_text()
    assert "<td>–" in page and "5 examples left out of train or eval" in page
    assert sum(map(len, sides.values())) + result.summary["removed_as_leak"] == len(rows)
    assert 0.05 < len(sides["eval"]) / 395 < 0.32  # 0.15 of 0.85, five standard deviations each way


def test_a_skewed_side_stops_the_line_with_its_numbers(tmp_path, monkeypatch):
    rows = [example(f"text {i}", label="rare" if i < 200 else "usual") for i in range(1000)]
    monkeypatch.setattr(
        "components.split.split.side_of",
        lambda row, *_: "eval" if row["label"] == "rare" else ("test" if row["id"] < "4" else "train"),
    )
    result, _ = run(rows, tmp_path, stratify_by="label")
    assert "KL of label between eval and the whole is 1.609 nats, over 0.1" in result.stop


def test_an_empty_side_stops_the_line(tmp_path):
    result, _ = run([example("only one")], tmp_path)
    assert (
        "has no example" in result.stop
        and list(result.summary["kl_nats"]["length"].values()).count(None) == 2
    )
    assert "left out" not in result.page.read_text()


def test_a_stratum_too_small_for_a_side_is_named_with_its_size(tmp_path, caplog):
    rows = [example(f"text {i}", label="usual") for i in range(400)] + [example("odd", label="<rare>")] * 2
    result, sides = run(rows, tmp_path, stratify_by="label")
    (home,) = [side for side in SIDES if any(row["label"] == "<rare>" for row in sides[side])]
    absent = {side: {} if side == home else {"<rare>": 2} for side in SIDES}
    assert result.summary["absent"] == absent and not result.stop
    for side in set(SIDES) - {home}:
        assert f"{side} has no example of label <rare> (2)" in caplog.text
        assert f"{side} has no example of label &lt;rare&gt; (2)" in result.page.read_text()


@pytest.mark.parametrize("seed", range(5))
def test_strata_come_close_to_their_shares_by_large_numbers(tmp_path, seed):
    labels = ["earn"] * 1000 + ["acq"] * 500 + ["grain"] * 100
    rows = [example(f"text {i}", label=label) for i, label in enumerate(labels)]
    result, _ = run(rows, tmp_path, stratify_by="label", seed=seed)
    assert not result.stop and not any(result.summary["absent"].values())
    assert all(value < 0.03 for value in result.summary["kl_nats"]["label"].values())


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1), st.data())
def test_kl_of_a_part_is_finite_and_not_negative(whole, data):
    part = {k: data.draw(st.integers(0, v)) for k, v in whole.items()}
    if sum(part.values()):
        assert -1e-12 <= kl_nats(part, whole) < 20
    assert kl_nats(whole, whole) == pytest.approx(0)


@pytest.mark.parametrize("values", [2, 6, 20])
@pytest.mark.parametrize("count", [20, 200])
def test_what_chance_explains_agrees_with_scipy(values, count):
    from scipy.stats import chi2

    # Wilson and Hilferty's approximation is within 1% in this tail from two degrees of freedom on, 4% at one.
    assert explained_by_chance(values, count) == pytest.approx(
        chi2.isf(0.001, values - 1) / (2 * count), rel=0.04
    )
