"""Heads, weights and gradient surgery, each against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from components.shared import heads
from components.shared.errors import StageStopped
from components.train.config import TrainConfig
from components.train.objectives import surgery
from components.train.objectives.config import MultiTaskObjective
from components.train.objectives.multi_task import MultiTask, heads_of
from components.train.update import gradients

ORIGIN = {"file": "corpus.jsonl", "line": 7, "part": "main"}
TASKS = {"price": {"head": "regression", "weight": 3.0}, "mood": {"weight": 0.5}}
ROWS = [
    {"id": str(i), "origin": ORIGIN, "task": task, "text": f"profit rose {i} times", "label": label}
    for i, (task, label) in enumerate(
        [
            ("mood", "+"),
            ("price", "10"),
            ("mood", "-"),
            ("price", "30.5"),
            ("topic", "oil"),
            ("topic", "rent"),
        ]
    )
]


def made_of(tiny_encoder, **changes):
    settings = MultiTaskObjective.model_validate({"kind": "multi-task", "tasks": TASKS} | changes)
    torch.manual_seed(1)  # heads whose gradients are in conflict, which the test of surgery needs
    return MultiTask(tiny_encoder, settings, heads_of(ROWS, settings), 1e-3, 0.0)


def losses_by_hand(made):
    """Loss of each task, summed over its rows, from the whole logits."""
    found = {}
    with torch.no_grad():
        for head, place in heads.slices(made.heads):
            total = 0.0
            for row in (r for r in ROWS if r["task"] == head.task):
                out = made.model(**made.tokenizer(row["text"], return_tensors="pt")).logits[0, place].double()
                if head.scale is None:
                    total -= float(out.log_softmax(0)[head.labels.index(row["label"])])
                else:
                    total += float(out[0] - (float(row["label"]) - 20.25) / 10.25) ** 2
            found[head.task] = total
    return found


def test_heads_are_slices_of_one_layer_in_the_order_of_the_card(tiny_encoder):
    made = made_of(tiny_encoder)
    assert [(head.task, head.labels) for head in made.heads] == [
        ("mood", ["+", "-"]),
        ("price", []),
        ("topic", ["oil", "rent"]),
    ]
    assert made.heads[1].scale.mean == 20.25 and made.heads[1].scale.deviation == pytest.approx(10.25)
    assert [place for _, place in heads.slices(made.heads)] == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert made.model.classifier.out_features == 5
    assert made.card_facts() == {"heads": made.heads, "task_in_text": False}


def test_fixed_weights_multiply_each_tasks_loss(tiny_encoder):
    made = made_of(tiny_encoder)
    by_task = losses_by_hand(made)
    expected = 0.5 * by_task["mood"] + 3 * by_task["price"] + by_task["topic"]
    assert float(made.summed_loss([made.encode(row) for row in ROWS], 0.0)) == pytest.approx(
        expected, rel=1e-5
    )


def test_uncertainty_weighting_is_kendalls_formula_and_eval_goes_without(tiny_encoder):
    made = made_of(tiny_encoder, weighting="uncertainty")
    s = {"mood": 0.3, "price": -0.7, "topic": 0.1}
    with torch.no_grad():
        made.model.task_log_variances.copy_(torch.tensor([s[h.task] for h in made.heads]) / made._ratio)
    encoded, by_task = [made.encode(row) for row in ROWS], losses_by_hand(made)
    weights, expected = {"mood": 0.5, "price": 3.0, "topic": 1.0}, 0.0
    for task, loss in by_task.items():
        # Regression: L / (2 sigma^2) + log sigma; classification: L / sigma^2 + log sigma; two rows each.
        factor = 0.5 if task == "price" else 1.0
        expected += weights[task] * (factor * loss * math.exp(-s[task]) + 2 * s[task] / 2)
    loss = made.summed_loss(encoded, 0.0)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    # dL/ds of a task: half its rows minus its weighted loss.
    slope = weights["price"] * (2 / 2 - 0.5 * by_task["price"] * math.exp(-s["price"]))
    assert float(made.model.task_log_variances.grad[1]) == pytest.approx(slope, rel=1e-4)
    with torch.no_grad():
        plain = sum(weights[task] * loss for task, loss in by_task.items())
        assert float(made.summed_loss(encoded, 0.0)) == pytest.approx(plain, rel=1e-5)
    assert made.notes()["weight_price"] == pytest.approx(math.exp(0.7))
    made.finish()
    assert not any("log_variances" in name for name, _ in made.model.named_parameters())


def test_two_gradients_in_conflict_lose_what_points_against_the_other():
    one, other = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([-1.0, 2.0, 0.0])
    total, conflicts = surgery.projected([one, other])
    dot, a, b = -1.0, one.numpy(), other.numpy()
    # Yu et al. 2020, algorithm 1: g_i - (g_i . g_j / |g_j|^2) g_j, for either.
    expected = (a - dot / (b @ b) * b) + (b - dot / (a @ a) * a)
    np.testing.assert_allclose(total.numpy(), expected, rtol=1e-6)
    assert conflicts == 2
    agreed, conflicts = surgery.projected([one, torch.tensor([1.0, 1.0, 0.0])])
    assert agreed.tolist() == [2.0, 1.0, 1.0] and conflicts == 0


def test_several_gradients_are_projected_one_after_the_other():
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(6, generator=generator) for _ in range(4)]
    torch.manual_seed(11)
    total, _ = surgery.projected(given)
    torch.manual_seed(11)  # the same random order
    expected = np.zeros(6)
    raw = [g.double().numpy() for g in given]
    for i, g in enumerate(raw):
        mine = g.copy()
        for j in torch.randperm(4).tolist():
            if i != j and mine @ raw[j] < 0:
                mine -= (mine @ raw[j]) / (raw[j] @ raw[j]) * raw[j]
        expected += mine
    np.testing.assert_allclose(total.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(expected, sum(raw))


def test_surgery_is_done_on_the_encoder_and_not_on_the_heads(tiny_encoder):
    found = {}
    for how in ("sum", "pcgrad"):
        made = made_of(tiny_encoder, gradients=how)
        config = TrainConfig(
            objective={"kind": "multi-task"}, base_model="tiny", max_grad_norm=1e9, precision="float32"
        )
        row = gradients(made, [[made.encode(row) for row in ROWS]], config, "float32")
        found[how] = row, {n: w.grad for n, w in made.model.named_parameters() if w.grad is not None}
    (plain, summed), (cut, projected) = found["sum"], found["pcgrad"]
    assert cut["loss"] == pytest.approx(plain["loss"], rel=1e-5) and "conflicts" not in plain
    by_task = {}
    for task in ("mood", "price", "topic"):
        made = made_of(tiny_encoder)
        (
            made.summed_loss([made.encode(row) for row in ROWS if row["task"] == task], 0.0) / len(ROWS)
        ).backward()
        by_task[task] = {n: w.grad for n, w in made.model.named_parameters() if w.grad is not None}
    body = [name for name in summed if not name.startswith("classifier")]
    flat = {task: torch.cat([grads[name].flatten() for name in body]) for task, grads in by_task.items()}
    against = sum(float(flat[a] @ flat[b]) < 0 for a in flat for b in flat if a != b)
    assert against > 0 and cut["conflicts"] > 0
    for name in ("classifier.weight", "classifier.bias"):
        torch.testing.assert_close(projected[name], summed[name], rtol=1e-4, atol=1e-6)
    ours = torch.cat([projected[name].flatten() for name in body])
    assert not torch.allclose(ours, torch.cat([summed[name].flatten() for name in body]), rtol=1e-3)


def test_conditioning_puts_the_tasks_name_before_the_text(tiny_encoder):
    made = made_of(tiny_encoder, conditioning="name")
    assert made.encode(ROWS[0]).ids == made.tokenizer("mood: profit rose 0 times")["input_ids"]
    assert made.card_facts()["task_in_text"]


def test_all_faults_of_the_tasks_are_told_at_once():
    settings = MultiTaskObjective.model_validate(
        {"kind": "multi-task", "tasks": {"mood": {"head": "regression"}, "prize": {"weight": 2}}}
    )
    with pytest.raises(StageStopped) as stopped:
        heads_of([row for row in ROWS if row["label"] != "oil"], settings)
    said = str(stopped.value)
    assert "no task 'prize'" in said and "mood: scores ['+', '-'] are no numbers" in said
    assert "topic: two labels or more are needed; train has ['rent']" in said
    assert "the tasks of train are ['mood', 'price', 'topic']" in said
