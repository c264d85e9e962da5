"""Which of the base's own weights move, when, and at what share of the rate."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.shared.errors import TuneyardError
from components.train import checkpoint
from components.train.adapters import unfreezing
from components.train.adapters.applying import apply_adapter, weight_counts
from components.train.adapters.config import KINDS, ProgressiveAdapter
from components.train.config import TrainConfig
from components.train.objectives.sft import Sft
from components.train.update import make_optimizer, step

EMBEDDINGS, NORM = "model.embed_tokens.weight", "model.norm.weight"


def settings_for(adapter, **changes):
    base = {"objective": "sft", "base_model": "tiny", "adapter": adapter, "precision": "float32"}
    return TrainConfig(**(base | changes))


@pytest.fixture
def opened(tiny_causal):
    def open_with(adapter, **changes):
        objective, config = Sft(tiny_causal, "float32"), settings_for(adapter, **changes)
        apply_adapter(objective, config)
        return objective, config

    return open_with


def moving(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def layer(name):
    return name.split(".")[2] if ".layers." in name else name


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"layers": 1}, {"1", NORM}),
        ({"layers": 2}, {"0", "1", NORM}),
        ({"layers": 0}, {NORM}),
        ({"layers": 1, "head": False}, {"1"}),
        ({"layers": 1, "embeddings": True}, {"1", NORM, EMBEDDINGS}),
    ],
)
def test_the_last_layers_move_and_nothing_below(opened, adapter, expected):
    objective, config = opened({"kind": "last_layers", **adapter})
    assert {layer(name) for name in moving(objective.model)} == expected
    count, total = weight_counts(objective, config, 10)
    assert count == sum(w.numel() for w in checkpoint.trainable(objective.model).values()) < total


def test_more_layers_than_there_are_and_none_at_all_are_refused(opened):
    with pytest.raises(
        TuneyardError, match=r"train\.adapter\.layers is 3, and Gemma3ForCausalLM has 2 layers"
    ):
        opened({"kind": "last_layers", "layers": 3})
    with pytest.raises(TuneyardError, match="would move nothing"):
        opened({"kind": "last_layers", "layers": 0, "head": False})


def test_layers_thaw_from_the_head_down(opened):
    objective, config = opened({"kind": "progressive", "every_steps": 3}, max_steps=12)
    seen = []
    for number in range(12):
        unfreezing.thaw(objective.model, config.adapter, number, 12)
        seen.append({layer(name) for name in moving(objective.model)})
    from_above = [{NORM}, {NORM, "1"}, {NORM, "1", "0"}, {NORM, "1", "0", EMBEDDINGS}]
    assert seen == [state for state in from_above for _ in range(3)]


def test_what_a_run_never_comes_to_is_neither_counted_nor_kept(opened):
    objective, config = opened({"kind": "progressive", "every_steps": 3}, max_steps=5)
    assert {layer(n) for n in checkpoint.trainable(objective.model)} == {NORM, "1", "0", EMBEDDINGS}
    count, total = weight_counts(objective, config, 5)
    kept = checkpoint.trainable(objective.model)
    assert {layer(name) for name in kept} == {NORM, "1"}
    assert count == sum(weight.numel() for weight in kept.values()) < total
    unfreezing.thaw(objective.model, config.adapter, 4, 5)
    assert moving(objective.model) == kept.keys()


@given(st.integers(1, 300), st.integers(2, 40), st.floats(0.05, 1.0))
def test_an_even_pace_begins_with_the_head_never_turns_back_and_ends_in_time(total, groups, until):
    adapter = ProgressiveAdapter(kind="progressive", until=until)
    counts = [unfreezing._moving(adapter, number, total, groups) for number in range(total)]
    assert counts[0] == 1 and counts == sorted(counts) and max(counts) <= groups
    if until * total >= groups and until < 1:
        assert all(count == groups for count in counts[int(until * total) + 1 :])
        steps = [later - earlier for earlier, later in itertools.pairwise(counts)]
        assert max(steps) <= 1


def test_a_run_says_one_pace_and_reads_its_own_settings_back():
    adapter = settings_for("progressive").adapter
    assert (adapter.until, adapter.every_steps) == (0.5, None)
    assert settings_for(adapter.model_dump(mode="json")).adapter == adapter
    with pytest.raises(ValueError, match=r"every_steps \(3\) and until \(0.2\) cannot both be set"):
        settings_for({"kind": "progressive", "every_steps": 3, "until": 0.2})


def test_each_layers_rate_is_a_share_of_the_one_above_it(opened):
    objective, config = opened({"kind": "full", "layer_decay": 0.5})
    optimizer = make_optimizer(objective.model, config)
    for weight in objective.model.parameters():
        weight.grad = torch.ones_like(weight)
    step(optimizer, 0.01)
    names = {id(weight): name for name, weight in objective.model.named_parameters()}
    rates = {layer(names[id(w)]): group["lr"] for group in optimizer.param_groups for w in group["params"]}
    assert rates == {NORM: 0.01, "1": 0.005, "0": 0.0025, EMBEDDINGS: 0.00125}


def test_every_adapter_has_its_usual_rate_and_no_decay_pulls_at_a_scale(opened):
    assert all(settings_for(kind).learning_rate == adapter.usual_rate for kind, adapter in KINDS.items())
    objective, config = opened("ia3", weight_decay=0.5)
    (group,) = make_optimizer(objective.model, config).param_groups
    assert group["weight_decay"] == 0.0
    objective, config = opened("lora", weight_decay=0.5)
    assert {g["weight_decay"] for g in make_optimizer(objective.model, config).param_groups} == {0.5}
