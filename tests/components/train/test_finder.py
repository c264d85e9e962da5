"""The learning-rate range test: it finds a rate that trains, leaves no trace, and is not run twice."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from components.shared.errors import TuneyardError
from components.train import checkpoint, curves, finder
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.data import schedule_batches
from components.train.finder import pick, settle
from components.train.fit import fit
from components.train.objectives.sft import Sft
from components.train.update import gradients


def config_for(**changes):
    given = {"objective": "sft", "base_model": "tiny", "precision": "float32", "learning_rate": "auto"}
    return TrainConfig(
        **(given | {"max_steps": 12, "per_device_batch_size": 4, "checkpoint_steps": 4} | changes)
    )


def opened(tiny_causal, config):
    torch.manual_seed(0)
    sft = Sft(tiny_causal, "float32")
    apply_adapter(sft, config)
    origin = {"file": "corpus.jsonl", "line": 1, "part": "main"}
    rows = [
        {"id": str(i), "origin": origin, "prompt": f"q {i}", "completion": f"合同 {i}"} for i in range(12)
    ]
    return sft, [sft.encode(row) for row in rows]


def updates_of(sft, encoded, config):
    steps = schedule_batches([len(e) for e in encoded], config, sft.packs)
    return [[[encoded[i] for i in micro] for micro in update] for update in steps]


def states(model):
    drawn = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    return {n: t.clone() for n, t in model.state_dict().items()}, drawn, model.training


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_leaves_no_trace_and_finds_the_same_again(tiny_causal, tmp_path, kind):
    config = config_for(adapter={"kind": kind}, dropout=0.2)
    sft, encoded = opened(tiny_causal, config)
    sft.model.register_buffer("seen", torch.zeros(1))

    def draw(*_):
        sft.model.seen.add_(1)
        random.random()
        np.random.rand()

    sft.model.base_model.register_forward_pre_hook(draw)
    sft.model.eval()
    before, drawn, mode = states(sft.model)
    found = settle(sft, updates_of(sft, encoded, config), config, "float32", tmp_path / "a")
    after, now_drawn, now_mode = states(sft.model)
    assert len(found.curve) > 20 and 1e-6 < found.rate < 1
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(drawn[0], now_drawn[0]) and drawn[1:] == now_drawn[1:] and mode == now_mode
    assert all(weight.grad is None for weight in sft.model.parameters())
    assert settle(sft, updates_of(sft, encoded, config), config, "float32", tmp_path / "b") == found


def test_the_noise_of_batches_is_not_in_the_curve(tiny_causal, tmp_path):
    config = config_for(adapter={"kind": "full"})
    sft, encoded = opened(tiny_causal, config)
    found = settle(sft, updates_of(sft, encoded, config), config, "float32", tmp_path)
    # At rates that move nothing yet the losses of the batches differ, and their changes do not.
    assert max(abs(row["change"]) for row in found.curve[:8]) < 5e-3
    three = updates_of(sft, encoded, config)[:3]
    losses = [gradients(sft, update, config, "float32")["loss"] for update in three]
    assert max(losses) - min(losses) > 5e-3


def rows(changes):
    return [{"learning_rate": 10 ** (n / 8 - 7), "change": change} for n, change in enumerate(changes)]


def test_the_pick_is_the_steepest_and_well_below_the_lowest():
    # Flat, then down by 0.1 a step from the 16th to the 40th, then up.
    changes = [-1e-4] * 16 + [-0.1 * n for n in range(1, 25)] + [-2.4 + 0.3 * n for n in range(1, 8)]
    rate = pick(rows(changes))
    assert 1e-4 <= rate <= 10 ** (40 / 8 - 7) / 10 * 1.8


def test_a_loss_that_never_falls_is_an_error_with_the_curve():
    with pytest.raises(TuneyardError, match=r"no rate at which the loss falls.*1e-07: \+0.100"):
        pick(rows([0.1] * 30))
    with pytest.raises(TuneyardError, match="no rate at which the loss falls"):
        pick([])


def test_only_auto_and_numbers_are_rates():
    assert config_for().learning_rate == "auto"
    for wrong in ("car", 0, -1.0):
        with pytest.raises(ValidationError):
            config_for(learning_rate=wrong)


def test_a_fit_trains_at_the_rate_found_and_goes_on_with_it(tiny_causal, tmp_path, monkeypatch):
    config = config_for()
    tests = []
    monkeypatch.setattr(
        finder, "range_test", lambda *given, real=finder.range_test: tests.append(1) or real(*given)
    )

    def fitted(folder, saved=lambda _: None):
        sft, encoded = opened(tiny_causal, config)
        result = fit(sft, encoded, encoded[:4], config, "float32", folder, lambda *_: None, saved=saved)
        return result, checkpoint.copy_weights(sft.model)

    whole, weights = fitted(tmp_path / "whole")
    assert max(row["learning_rate"] for row in whole.history) == whole.range_test["rate"] > 1e-5
    assert whole.best_loss < whole.base_loss - 0.05

    def vanish(path):
        raise ConnectionError(path.name)

    with pytest.raises(ConnectionError):
        fitted(tmp_path / "cut", vanish)
    assert len(tests) == 2
    (tmp_path / "cut" / "learning_rate.json").unlink()  # a node that vanished leaves its checkpoints alone
    again, resumed = fitted(tmp_path / "cut")
    assert len(tests) == 2 and again.range_test["rate"] == whole.range_test["rate"]
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    page = curves._range_test(whole.range_test)
    assert f"Learning rate found: {whole.range_test['rate']:.2g}" in page and "rate 1e-07" in page


def test_an_attempt_without_a_checkpoint_leaves_what_it_found(tiny_causal, tmp_path, monkeypatch):
    config = config_for()
    sft, encoded = opened(tiny_causal, config)
    found = settle(sft, updates_of(sft, encoded, config), config, "float32", tmp_path)
    monkeypatch.setattr(finder, "range_test", lambda *_: pytest.fail("it was run twice"))
    assert settle(sft, [], config, "float32", tmp_path) == found
