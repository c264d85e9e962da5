"""Diagnostics: each rule fires exactly when it should, and trainings made to fail are found out."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.shared.modelcard import BaseModelRef, ModelCard
from components.train import checkpoint, curves, diagnostics, machine_rules, measures, rules
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives.sft import Sft


def history(losses, **columns):
    """Rows of a calm training; `columns` gives others, a value for each step or None for none."""
    rows = []
    for at, loss in enumerate(losses):
        row = {"step": at + 1, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0}
        row |= {name.replace("__", "."): of[at] for name, of in columns.items() if of[at] is not None}
        rows.append(row)
    return rows


LOSSES = st.floats(0.001, 30, allow_nan=False)


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=1, max_size=25))
def test_overfitting_needs_ten_points_and_both_slopes(points):
    # Two steps an evaluation, so that the loss on train between evaluations is a mean.
    rows = history(
        [loss for train, _ in points for loss in (train - 0.0005, train + 0.0005)],
        eval_loss=[value for _, evaluated in points for value in (None, evaluated)],
    )
    expected = None
    for end in range(10, len(points) + 1):
        train, evaluated = (np.polyfit(range(5), [p[i] for p in points[end - 5 : end]], 1)[0] for i in (0, 1))
        if min(abs(train + 0.01), abs(evaluated - 0.01)) < 1e-9:
            return  # at the bound two ways to fit a line may differ
        if train < -0.01 and evaluated > 0.01:
            expected = 2 * (end - 4)
            break
    found = rules.overfitting(rows)
    assert (found.since if found else None) == expected


def test_overfitting_is_found_and_not_before_ten_points():
    def rows(count):
        return history(
            [3 - 0.02 * at for at in range(count)], eval_loss=[3 + 0.02 * at for at in range(count)]
        )

    assert rules.overfitting(rows(9)) is None
    found = rules.overfitting(rows(10))
    assert found.since == 6 and "-0.020 nats" in found.what and "+0.020 on eval" in found.what


@given(st.lists(LOSSES, min_size=1, max_size=30))
def test_a_rate_is_too_high_where_three_losses_are_above_twice_the_first(losses):
    expected = next(
        (at + 1 for at in range(2, len(losses)) if sorted(losses[at - 2 : at + 1])[1] > 2 * losses[0]), None
    )
    found = rules.too_high(history(losses))
    assert (found.since if found else None) == expected
    assert found is None or found.todo == "divide train.learning_rate by 10: 1e-05"


def test_twice_a_loss_without_a_zero_says_nothing():
    assert rules.too_high(history([-0.1, 5, 5, 5, 5])) is None


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=1, max_size=12), st.booleans())
def test_a_rate_is_too_low_where_nothing_ever_moved(points, calm):
    if calm:  # within a band of 0.02 nats about 3, so that both answers come up
        points = [(3 + a / 1500, 3 + b / 1500) for a, b in points]
    train, evaluated = zip(*points, strict=True)
    expected = (
        len(points) >= 5
        and max(abs(value - 3) for value in evaluated) < 0.01
        and max(train) - min(train) < 0.01
    )
    found = rules.too_low(history(train, eval_loss=evaluated), 3.0)
    assert (found is not None) == expected
    assert found is None or found.todo == "multiply train.learning_rate by 10: 0.001"


@given(st.lists(st.floats(0, 300), min_size=1, max_size=80))
def test_gradients_explode_above_a_hundred_or_ten_times_the_median(norms):
    expected = None
    for at, norm in enumerate(norms):
        before = norms[max(0, at - 50) : at]
        jump = len(before) >= 10 and statistics.median(before) > 0 and norm > 10 * statistics.median(before)
        if norm > 100 or jump:
            expected = at + 1
            break
    found = rules.exploding(history([1.0] * len(norms), grad_norm=norms))
    assert (found.since if found else None) == expected


def test_a_jump_needs_ten_steps_before_it():
    assert rules.exploding(history([1.0] * 10, grad_norm=[1.0] * 9 + [50.0])) is None
    found = rules.exploding(history([1.0] * 11, grad_norm=[1.0] * 10 + [50.0]))
    assert found.since == 11 and "50 times the median" in found.what


@given(st.lists(st.sampled_from([1e-7, 0.5e-4, 2e-4, 1.0]), min_size=1, max_size=9))
def test_a_layer_vanishes_below_a_ten_thousandth_of_the_median_three_looks_in_a_row(norms):
    size = len(norms)
    rows = history(
        [1.0] * size,
        grad_norm__layers__0=norms,
        grad_norm__layers__1=[1.0] * size,
        grad_norm__layers__2=[1.0] * size,
        grad_norm__head=[1e-9] * size,  # no layer: it is not like them
    )
    # Names have dots where keywords cannot.
    expected = next(
        (at + 1 for at in range(size - 2) if all(norm < 1e-4 for norm in norms[at : at + 3])), None
    )
    found = rules.vanishing(rows)
    assert (found.since if found else None) == expected
    assert found is None or "layers.0" in found.what


def test_a_gradient_of_zero_is_dead_and_not_faint():
    layers = {f"grad_norm__layers__{n}": [1.0] * 4 for n in (1, 2)}
    assert rules.vanishing(history([1.0] * 4, grad_norm__layers__0=[0.0] * 4, **layers)) is None


@given(st.lists(st.sampled_from([0.9e-5, 1.1e-5, 1e-3, 0.09, 0.11]), min_size=1, max_size=9))
def test_updates_are_odd_outside_their_bounds_twice_in_a_row(ratios):
    rows = history([1.0] * len(ratios), update_ratio__head=ratios)
    expected = None
    # The first row is the end of the warm-up.
    for at in range(1, len(ratios) - 1):
        pair = ratios[at : at + 2]
        if max(pair) < 1e-5 or min(pair) > 1e-1:
            expected = at + 1
            break
    found = rules.odd_updates(rows)
    assert (found.since if found else None) == expected


def test_the_end_of_the_schedule_may_move_little_and_warm_up_may_move_much():
    rows = history([1.0] * 6, update_ratio__head=[0.5, 0.5, 1e-3, 1e-3, 1e-6, 1e-6])
    for row, rate in zip(rows, [1e-5, 5e-5, 1e-4, 9e-5, 5e-6, 1e-6], strict=True):
        row["learning_rate"] = rate
    assert rules.odd_updates(rows) is None
    rows[4]["learning_rate"] = rows[5]["learning_rate"] = 2e-5
    assert rules.odd_updates(rows).rule == "updates too small"


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=9))
def test_weights_are_dead_when_they_stand_still_twice_after_warm_up(shares):
    expected = next((at + 1 for at in range(1, len(shares) - 1) if shares[at] and shares[at + 1]), None)
    found = rules.still_weights(history([1.0] * len(shares), still__head=shares))
    assert (found.since if found else None) == expected
    unmoved = history([1.0] * 4, still__head=[0.0] * 4, update_ratio__head=[0.0] * 4)
    assert rules.still_weights(unmoved).since == 2


@given(st.lists(st.floats(0.5, 3), min_size=1, max_size=90))
def test_throughput_falls_when_twenty_steps_are_a_third_slower_than_the_first(seconds):
    rows = history([1.0] * len(seconds), step_seconds=seconds, step_tokens=[100] * len(seconds))
    later = seconds[5:]
    blocks = [sum(later[at : at + 20]) for at in range(0, len(later) - 19, 20)]
    slow = next((n for n, block in enumerate(blocks) if n and blocks[0] / block < 0.7), None)
    if any(math.isclose(blocks[0] / block, 0.7) for block in blocks):
        return
    found = machine_rules.slowing(rows)
    assert (found.since if found else None) == (None if slow is None else 6 + 20 * slow)


def test_throughput_that_falls_is_found():
    seconds = [1.0] * 30 + [2.0] * 30
    found = machine_rules.slowing(history([1.0] * 60, step_seconds=seconds, step_tokens=[100] * 60))
    assert found.since == 26 and "57 tokens/s over 20 steps, 100 at the start" in found.what


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=15), st.lists(st.floats(20, 110), min_size=15, max_size=15)
)
def test_the_machine_is_short_of_something(shares, degrees):
    size = len(shares)
    rows = history(
        [1.0] * size, memory_fraction=shares, gpu_memory_fraction=shares, gpu_use=shares, gpu_celsius=degrees
    )
    full = next((at + 1 for at, share in enumerate(shares) if share > 0.92), None)
    assert [f.since for f in machine_rules.short_of_memory(rows)] == ([full, full] if full else [])
    hot = next((at + 1 for at in range(size) if degrees[at] >= 85), None)
    idle = size >= 10 and statistics.median(shares) < 0.5
    expected = ([("GPU idle", 1)] if idle else []) + ([("GPU hot", hot)] if hot else [])
    assert [(f.rule, f.since) for f in machine_rules.of_gpu(rows)] == expected


def test_each_finding_is_said_once_when_it_begins_and_not_again_after_a_resume(caplog):
    rows = history([3.0, 3.0, 7.0, 7.0, 7.0, 7.0], eval_loss=[3.0] * 6, grad_norm=[1, 1, 1, 1, 1, 500])
    watch = diagnostics.Watch([], 3.0)
    for end in range(1, 5):
        watch.see(rows[:end])
    assert [r.message.split(":")[1].strip() for r in caplog.records] == [
        "learning rate too high since step 4"
    ]
    caplog.clear()
    resumed = diagnostics.Watch(rows[:4], 3.0)
    for end in (5, 6):
        resumed.see(rows[:end])
    assert [r.message.split(":")[1].strip() for r in caplog.records] == ["exploding gradients since step 6"]
    assert [f.rule for f in diagnostics.diagnose(rows, 3.0)] == [
        "learning rate too high",
        "exploding gradients",
    ]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", "layers.3"),
        ("bert.encoder.layer.11.output.dense.weight", "encoder.layer.11"),
        ("decoder.block.2.layer.1.EncDecAttention.q.weight", "decoder.block.2"),
        ("model.embed_tokens.weight", "embeddings"),
        ("bert.embeddings.LayerNorm.bias", "embeddings"),
        ("base_model.model.score.modules_to_save.default.weight", "head"),
        ("model.norm.weight", "head"),
        ("prompt_encoder.default.embedding.weight", "prompt"),
    ],
)
def test_a_weight_belongs_to_a_part(name, group):
    assert measures.group_of(name) == group


def weights(*shapes):
    torch.manual_seed(0)
    found = {f"layers.{n}.weight": torch.nn.Parameter(torch.randn(s)) for n, s in enumerate(shapes)}
    for weight in found.values():
        weight.grad = torch.randn_like(weight)
    return found


def test_clipping_is_that_of_torch_and_says_the_norm_of_each_part():
    ours, theirs = (weights((30, 20), (7,), (5, 5)) for _ in range(2))
    expected = float(torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.5))
    norms = {name: float(weight.grad.double().norm()) for name, weight in ours.items()}
    ours["layers.3.weight"] = torch.nn.Parameter(torch.randn(4))  # which has no gradient
    ours["layers.0.bias"] = torch.nn.Parameter(torch.randn(4))
    found = measures.clip(ours, 0.5)
    assert found["grad_norm"] == expected
    for name, weight in theirs.items():
        assert torch.equal(ours[name].grad, weight.grad)
        # A norm in float32 of some hundred entries.
        assert found[f"grad_norm.{measures.group_of(name)}"] == pytest.approx(norms[name], rel=1e-5)
    assert (found["still.layers.0"], found["still.layers.1"], found["still.layers.3"]) == (0.5, 0, 1)
    assert measures.plain(found) == {"grad_norm": expected}


def test_no_gradient_at_all_is_a_norm_of_zero():
    found = measures.clip({"head.weight": torch.nn.Parameter(torch.ones(3))}, 1.0)
    assert found == {"grad_norm": 0.0, "grad_norm.head": 0.0, "still.head": 1.0}


def test_an_update_is_measured_from_some_entries_of_large_weights():
    # 300 times more entries than are looked at; the columns differ, so a step of whole rows would be wrong.
    scale = torch.linspace(0.1, 10, 640)
    large = torch.nn.Parameter(torch.randn(2000, 640, generator=torch.Generator().manual_seed(0)) * scale)
    small = torch.nn.Parameter(torch.ones(3, 2))
    held = {"model.embed_tokens.weight": large, "layers.0.weight": small}
    before, old = measures.sample(held), large.detach().clone()
    with torch.no_grad():
        large += 1e-3 * torch.randn(2000, 640, generator=torch.Generator().manual_seed(1))
        small += 0.5
    found = measures.moved(before, held)
    assert sum(entries.numel() for entries in before.values()) < 10_000
    # 4,000 entries give a root mean square to 1/sqrt(8000), about 1%; three times that, for two of them.
    exact = float((large.detach() - old).norm() / old.norm())
    assert found["update_ratio.embeddings"] == pytest.approx(exact, rel=0.05)
    assert found["update_ratio.layers.0"] == pytest.approx(0.5)


def test_memory_is_that_of_the_container(tmp_path, monkeypatch):
    measures.memory_limit.cache_clear()
    monkeypatch.setattr(measures, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    whole = measures.memory_limit()
    measures.memory_limit.cache_clear()
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    found = measures.machine()
    measures.memory_limit.cache_clear()
    assert whole > 2**30
    assert found["memory_fraction"] == pytest.approx(found["memory_gib"])


def dialogues(count, answer="answer"):
    origin = {"file": "corpus.jsonl", "line": 1, "part": "main"}
    return [
        {"id": str(i), "origin": origin, "prompt": f"question {i}", "completion": f"{answer} {i * 7919 % 97}"}
        for i in range(count)
    ]


def trained(tiny_causal, folder, prepare=lambda model: None, **changes):
    """History of a real fit, and its base loss."""
    given = {"objective": "sft", "base_model": "tiny", "precision": "float32", "early_stopping": None}
    config = TrainConfig(**(given | {"per_device_batch_size": 4} | changes))
    torch.manual_seed(0)
    sft = Sft(tiny_causal, "float32")
    apply_adapter(sft, config)
    prepare(sft.model)
    train = [sft.encode(row) for row in dialogues(8)]
    evaluation = [sft.encode(row) for row in dialogues(8, "另一个")]
    return fit(sft, train, evaluation, config, "float32", folder, lambda *_: None)


def found_in(result):
    return {found.rule: found for found in diagnostics.diagnose(result.history, result.base_loss)}


def test_a_training_that_goes_well_is_left_alone(tiny_causal, tmp_path):
    result = trained(
        tiny_causal, tmp_path, max_steps=30, eval_steps=5, learning_rate=1e-3, adapter={"kind": "full"}
    )
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    assert not found_in(result)
    assert {n.split(".", 1)[1] for n in result.history[-1] if n.startswith("update_ratio.")} == {
        "layers.0",
        "layers.1",
        "embeddings",
    }


def test_an_overfitting_training_is_found_out(tiny_causal, tmp_path, caplog):
    result = trained(
        tiny_causal, tmp_path, max_steps=150, eval_steps=5, learning_rate=5e-3, adapter={"kind": "full"}
    )
    found = found_in(result)["overfitting"]
    assert result.history[-1]["loss"] < 1 < result.base_loss < result.history[-1]["eval_loss"]
    assert f"train: {found}" in caplog.messages


def test_a_rate_a_thousand_times_too_high_is_found_out(tiny_causal, tmp_path):
    # Of 1e-3, which goes well above.
    settings = {"learning_rate": 1.0, "warmup_fraction": 0, "max_steps": 20}
    result = trained(tiny_causal, tmp_path, adapter={"kind": "full"}, **settings)
    found = found_in(result)
    assert "learning rate too high" in found and "updates too large" in found
    assert found["learning rate too high"].todo.endswith(": 0.1")


def test_a_rate_that_moves_nothing_is_found_out(tiny_causal, tmp_path):
    result = trained(tiny_causal, tmp_path, max_steps=20, learning_rate=1e-8, min_learning_rate=0)
    assert {"learning rate too low", "updates too small"} <= found_in(result).keys()


def test_a_frozen_adapter_is_found_out(tiny_causal, tmp_path):
    def freeze(model):
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.requires_grad = False

    result = trained(tiny_causal, tmp_path, freeze, max_steps=20)
    dead = found_in(result)["dead weights"]
    assert "these shares do not: layers.0 1, layers.1 1" in dead.what
    assert "dead weights" not in found_in(trained(tiny_causal, tmp_path / "b", max_steps=20))


def test_the_page_shows_findings_and_the_curves_of_each_part(tiny_causal, tmp_path):
    result = trained(tiny_causal, tmp_path, max_steps=20, learning_rate=1e-8, min_learning_rate=0)
    base = BaseModelRef(uri="s3://models/tiny", fingerprint="f")
    card = ModelCard(
        task="causal-lm",
        layout="peft",
        base_model=base,
        max_length_tokens=8,
        trainable_weights=1,
        total_weights=9,
    )
    rows = [{"step": 0, "eval_loss": result.base_loss}, *result.history]
    findings = diagnostics.diagnose(result.history, result.base_loss)
    page = curves.page(rows, card, {}, findings, {})
    assert "learning rate too low</b> since step" in page
    for name in ("grad_norm.layers.1", "update_ratio.layers.0", "memory_gib"):
        assert f"<title>{name}</title>" in page
    assert ("No GPU on this machine" in page) == (not torch.cuda.is_available())
    assert "No rule found anything" in curves.page(rows, card, {}, [], {})
    assert checkpoint.newest(tmp_path) is None  # no checkpoint was due: the history came from the fit


def test_layers_are_listed_by_number():
    rows = [{f"grad_norm.layers.{n}": 1.0 for n in (10, 2, 1)} | {"grad_norm.head": 1.0}]
    assert curves.groups(rows, "grad_norm.") == [
        "grad_norm.head",
        "grad_norm.layers.1",
        "grad_norm.layers.2",
        "grad_norm.layers.10",
    ]
