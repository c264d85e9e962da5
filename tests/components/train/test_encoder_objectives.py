"""Regression, classification's class weights and the updates of every encoder objective."""

from __future__ import annotations

import math
import random

import pytest
import torch
from pydantic import ValidationError

from components.shared.errors import StageStopped
from components.train.adapters.applying import apply_adapter, weight_counts
from components.train.config import TrainConfig
from components.train.data import fit_lengths, refuse_beyond
from components.train.fit import fit
from components.train.objectives.classification import Classification, class_weights
from components.train.objectives.config import RegressionObjective
from components.train.objectives.opening import open_objective
from components.train.objectives.regression import Regression, scale_of
from components.train.update import gradients

ORIGIN = {"file": "corpus.jsonl", "line": 7, "part": "main"}
WORDS = ["profit", "rose", "sharply", "losses", "widened", "again", "oil", "wheat", "the", "lessee", "pay"]


def texts(count):
    draw = random.Random(1)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(count)]


def rows(kind, count=12):
    """Healthy examples of an objective's dataset type."""
    draw, found = random.Random(2), []
    for number, text in enumerate(texts(count)):
        row = {"id": f"{number:03}", "origin": ORIGIN}
        first = text.split()[0]
        match kind:
            case "classification":
                row |= {"text": text, "label": "up" if len(text) > 20 else "down"}
            case "regression":
                row |= {"text": text, "score": 100 + len(text) + draw.random()}
            case "token-classification":
                row |= {"text": text, "entities": [{"start": 0, "end": len(first), "label": "WORD"}]}
            case "contrastive":
                row |= {"anchor": text, "positive": f"{text} {number}"}
                row |= {"negative": f"the {first}"} if number % 2 else {}
            case "multi-task":
                task = ("mood", "price", "topic")[number % 3]
                mood, price = "+" if len(text) > 30 else "-", f"{len(text) / 3:.3f}"
                label = {"mood": mood, "price": price, "topic": "short" if len(text) < 30 else "long"}
                row |= {"task": task, "text": text, "label": label[task]}
        found.append(row)
    return found


OBJECTIVES = {
    "classification": {"kind": "classification", "class_weights": "balanced"},
    "regression": {"kind": "regression", "loss": "huber"},
    "token-classification": {"kind": "token-classification"},
    "contrastive": {"kind": "contrastive", "symmetric": True},
    "multi-task": {"kind": "multi-task", "tasks": {"price": {"head": "regression", "weight": 2.0}}},
    "pcgrad": {
        "kind": "multi-task",
        "tasks": {"price": {"head": "regression"}},
        "gradients": "pcgrad",
        "weighting": "uncertainty",
    },
}


def settings(objective, **changes):
    base = {
        "objective": OBJECTIVES[objective],
        "base_model": "tiny",
        "adapter": "full",
        "precision": "float32",
        "dropout": 0.0,
        "learning_rate": 2e-3,
        "max_length": 64,
    }
    return TrainConfig(**(base | changes))


def opened(objective, folder, **changes):
    """(objective with its adapter, its encoded examples, settings)."""
    config = settings(objective, **changes)
    found = rows(config.objective.kind)
    torch.manual_seed(0)
    made = open_objective(config, found, folder)
    apply_adapter(made, config)
    return made, [made.encode(row) for row in found], config


def gradients_of(objective, tiny_encoder, sizes, **changes):
    made, encoded, config = opened(objective, tiny_encoder, max_grad_norm=1e9, **changes)
    rest = iter(encoded)
    torch.manual_seed(1)
    row = gradients(made, [[next(rest) for _ in range(size)] for size in sizes], config, "float32")
    return row, {n: w.grad for n, w in made.model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("sizes", [[6, 6], [1, 4, 7], [3] * 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_give_the_gradient_of_one_batch(objective, tiny_encoder, sizes):
    whole, expected = gradients_of(objective, tiny_encoder, [12])
    row, found = gradients_of(objective, tiny_encoder, sizes)
    assert row["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        # The same sums in another order and padding: float32 rounding only.
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_reaches_every_weight_of_the_model(objective, tiny_encoder):
    """BERT's pooler, of which not every objective makes use, was once trained along as a dead weight."""
    made, encoded, config = opened(objective, tiny_encoder)
    gradients(made, [encoded], config, "float32")
    weights = made.model.named_parameters()
    assert [name for name, weight in weights if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_learns_with_each_adapter(objective, tiny_encoder, tmp_path, kind):
    rate = {"lora": 8e-3, "full": 3e-3}[kind]
    steps = {"max_steps": 40, "learning_rate": rate, "per_device_batch_size": 6, "eval_steps": 10}
    made, encoded, config = opened(objective, tiny_encoder, adapter=kind, **steps)
    moving, total = weight_counts(made, config, 40)
    assert (moving < total) == (kind == "lora")
    state = fit(made, encoded, encoded, config, "float32", tmp_path, lambda *_: None)
    assert state.best_loss < 0.9 * state.base_loss


@pytest.mark.parametrize("objective", ["contrastive", "pcgrad"])
def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(objective, tiny_encoder, tmp_path):
    def run(folder, crash_after=None):
        changes = {"max_steps": 8, "per_device_batch_size": 3, "gradient_accumulation_steps": 2}
        changes |= {"checkpoint_steps": 2, "dropout": 0.1, "eval_steps": 4}
        made, encoded, config = opened(objective, tiny_encoder, **changes)
        original, calls = made.gradient, []

        def counted(*given):
            calls.append(1)
            if len(calls) == crash_after:
                raise KeyboardInterrupt
            return original(*given)

        made.gradient = counted
        fit(made, encoded[:9], encoded[9:], config, "float32", folder, lambda *_: None)
        return {name: weight.detach().clone() for name, weight in made.model.named_parameters()}

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 6)
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_regression_is_the_loss_of_transformers_or_hubers_formula_on_standardised_scores(tiny_encoder, loss):
    found = rows("regression")
    scores = [row["score"] for row in found]
    scale = scale_of(scores, "scores")
    mean = sum(scores) / len(scores)
    assert scale.mean == pytest.approx(mean)
    assert scale.deviation == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores)))
    torch.manual_seed(0)
    asked = RegressionObjective(kind="regression", loss=loss, huber_delta=0.5)
    made = Regression(tiny_encoder, asked, scale, 0.0)
    batch = made.tokenizer([row["text"] for row in found], return_tensors="pt", padding=True)
    targets = torch.tensor([(s - scale.mean) / scale.deviation for s in scores])
    with torch.no_grad():
        ours = float(made.summed_loss([made.encode(row) for row in found], 0.0))
        theirs = made.model(**batch, labels=targets)
    if loss == "mse":
        expected = float(theirs.loss) * len(found)
    else:
        away = (theirs.logits[:, 0] - targets).abs().tolist()
        # Huber 1964: half the square within delta, linear with the same slope beyond.
        expected = sum(a * a / 2 if a <= 0.5 else 0.5 * (a - 0.25) for a in away)
        assert min(away) < 0.5 < max(away)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_scores_that_are_all_the_same_stop_the_line():
    with pytest.raises(StageStopped, match="all 3 scores of train are 4"):
        scale_of([4.0, 4.0, 4.0], "scores")


def test_balanced_class_weights_are_those_of_scikit_learn_and_average_to_one():
    import numpy
    from sklearn.utils.class_weight import compute_class_weight

    labels = ["a"] * 7 + ["b"] * 2 + ["c"]
    found = class_weights([{"label": label} for label in labels], "balanced")
    classes = numpy.array(["a", "b", "c"])
    assert [found[c] for c in "abc"] == pytest.approx(
        compute_class_weight("balanced", classes=classes, y=labels)
    )
    given = class_weights([{"label": label} for label in labels], {"c": 5.0})
    assert given["c"] == pytest.approx(5 * given["a"]) and given["a"] == given["b"]
    assert sum(given[label] for label in labels) / len(labels) == pytest.approx(1)
    with pytest.raises(StageStopped, match=r"names \['d'\]; the labels of train are \['a', 'b', 'c'\]"):
        class_weights([{"label": label} for label in labels], {"d": 5.0})


def test_class_weights_multiply_the_loss_of_each_class(tiny_encoder):
    found = rows("classification")
    losses = {}
    for name, weights in {
        "none": None,
        "up": {"down": 0.0, "up": 1.0},
        "down": {"down": 3.0, "up": 0.0},
    }.items():
        torch.manual_seed(0)
        made = Classification(tiny_encoder, ["down", "up"], 0.0, weights)
        with torch.no_grad():
            losses[name] = float(made.summed_loss([made.encode(row) for row in found], 0.0))
    assert losses["none"] == pytest.approx(losses["up"] + losses["down"] / 3, rel=1e-5)


def test_label_smoothing_is_refused_where_there_are_no_labels():
    with pytest.raises(ValidationError, match="means nothing to regression"):
        settings("regression", label_smoothing=0.1)
    assert settings("multi-task", label_smoothing=0.1).label_smoothing == 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_long_text_is_cut_as_in_service(objective, tiny_encoder):
    made, _, config = opened(
        objective, tiny_encoder, max_length=8, over_length="truncate_prompt", max_over_length=1
    )
    found = [row for row in rows(config.objective.kind)]
    kept, ledger = fit_lengths(found, made.encode, made.shorten, config)
    assert ledger.counts["cut"] > 0 and max(map(len, kept)) <= 8 and len(kept) == len(found)
    field = "anchor" if objective == "contrastive" else "text"
    for row, one in zip(found, kept, strict=True):
        served = made.tokenizer(row[field], truncation=True, max_length=8)["input_ids"]
        assert (one.anchor if objective == "contrastive" else one.ids) == served


def test_a_text_beyond_the_models_positions_is_refused_with_the_setting(tiny_encoder):
    config = TrainConfig(objective="classification", base_model=str(tiny_encoder), max_length=2000)
    long = [{**row, "text": "profit " * 1500} for row in rows("classification", 2)]
    objective = open_objective(config, rows("classification"), tiny_encoder)
    encoded = [objective.encode(row) for row in [*rows("classification"), *long]]
    most = objective.window_tokens
    longest = objective.longest_tokens
    with pytest.raises(StageStopped, match=f"1502 tokens, the base model reads {most}.*") as stop:
        refuse_beyond(most, longest(encoded))
    assert f"train.max_length to {most}" in str(stop.value.todo)
    refuse_beyond(most, longest(encoded[:-2]))
    refuse_beyond(None, longest(encoded))
