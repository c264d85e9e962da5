"""Against forgetting: replay, EWC and the base's predictions, by formula and on a model that forgets."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from components.shared import jsonl
from components.shared.errors import StageStopped, TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context
from components.train import checkpoint, holding, retention
from components.train import train as stage
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import eval_loss, fit
from components.train.objectives.opening import open_objective
from components.train.objectives.sft import Sft
from components.train.ranks import ALONE
from components.train.update import gradients

ORIGIN = {"file": "corpus.jsonl", "line": 1, "part": "main"}


def config_for(retain=None, **changes):
    given = {"objective": "sft", "base_model": "tiny", "precision": "float32", "early_stopping": None}
    return TrainConfig(**(given | {"per_device_batch_size": 4, "retain": retain} | changes))


def opened(folder, config):
    torch.manual_seed(0)
    sft = Sft(folder, "float32")
    apply_adapter(sft, config)
    return sft


def old(count):
    return [
        {"id": f"o{i}", "origin": ORIGIN, "prompt": f"old {i}", "completion": "the rent is due"}
        for i in range(count)
    ]


def new(count):
    return [
        {"id": f"n{i}", "origin": ORIGIN, "prompt": f"new {i}", "completion": "合同成立"}
        for i in range(count)
    ]


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=30),
    st.floats(0, 0.9),
    st.integers(1, 7),
)
def test_replay_gives_the_fraction_asked_for_and_drops_nothing(sizes, fraction, kept):
    updates = [
        [[("train", n, m, e) for e in range(size)] for m, size in enumerate(of)] for n, of in enumerate(sizes)
    ]
    config = config_for()
    mixed = retention.replayed(updates, [("kept", k) for k in range(kept)], fraction, config)
    assert len(mixed) == len(updates)
    for before, after in zip(updates, mixed, strict=True):
        ours = [e for micro in after for e in micro if e[0] == "train"]
        assert sorted(ours) == sorted(e for micro in before for e in micro)
        assert all(0 < len(micro) <= 4 for micro in after)
    drawn = [e for update in mixed for micro in update for e in micro if e[0] == "kept"]
    trained = sum(map(sum, sizes))
    # To half an example, whatever the fraction.
    assert abs(len(drawn) - trained * fraction / (1 - fraction)) <= 0.5 + 1e-9
    counts = [drawn.count(("kept", k)) for k in range(kept)]
    assert max(counts) - min(counts) <= 1
    assert retention.replayed(updates, [("kept", k) for k in range(kept)], fraction, config) == mixed


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_ewc_is_its_formula(tiny_causal, kind):
    config = config_for(adapter={"kind": kind})
    sft = opened(tiny_causal, config)
    kept = [sft.encode(row) for row in old(3)]
    sft.model.train()
    ewc = holding.Ewc(sft, kept, 7.0)
    assert sft.model.training
    weights = checkpoint.trainable(sft.model)
    base = {name: weight.detach().double().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.01 * torch.randn_like(weight)
            weight.grad = torch.ones_like(weight)
    penalty = ewc.add(weights)

    # By the formula, in float64, on a model that was opened anew.
    anew = opened(tiny_causal, config)
    anew.model.double().eval()
    fisher = {name: torch.zeros_like(weight) for name, weight in checkpoint.trainable(anew.model).items()}
    for example in kept:
        anew.model.zero_grad()
        ids = torch.tensor([[*example.prompt, *example.answer]])
        # One example laid by itself, through transformers' own forward pass.
        anew.model.set_attn_implementation("eager")
        said = torch.log_softmax(anew.model(input_ids=ids).logits[0].double(), -1)
        start = len(example.prompt)
        nats = -sum(said[start - 1 + n, token] for n, token in enumerate(example.answer))
        nats.backward()
        for name, weight in checkpoint.trainable(anew.model).items():
            fisher[name] += weight.grad**2
    terms = sum(len(example.answer) for example in kept)
    away = {name: weight.detach().double() - base[name] for name, weight in weights.items()}
    expected = 3.5 * sum(float((fisher[n] / terms * away[n] ** 2).sum()) for n in weights)
    # Squares of gradients in float32 against float64.
    assert penalty == pytest.approx(expected, rel=1e-3) and penalty > 0
    for name, weight in weights.items():
        exact = 1 + 7.0 * fisher[name] / terms * away[name]
        torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_divergence_from_the_base_is_its_formula(tiny_causal, kind):
    config = config_for(adapter={"kind": kind})
    sft = opened(tiny_causal, config)
    batch = [sft.encode(row) for row in new(3)]
    sft.model.eval()
    held = holding.Distillation(sft, 3.0)
    terms = sum(map(sft.terms, batch))

    def logits():
        states, project = sft.outputs(batch)
        return project(states)

    with torch.no_grad():
        base = logits().double()
        for weight in checkpoint.trainable(sft.model).values():
            weight += 0.05 * torch.randn_like(weight)
    sft.model.zero_grad(set_to_none=True)
    found = held([batch[:1], batch[1:]], terms, holding.nullcontext, ALONE)["base_divergence"]
    ours = {n: w.grad.clone() for n, w in checkpoint.trainable(sft.model).items() if w.grad is not None}
    sft.model.zero_grad(set_to_none=True)
    p, said = torch.softmax(base, -1), torch.log_softmax(logits().double(), -1)
    exact = (p * (torch.log_softmax(base, -1) - said)).sum() / terms
    (3 * exact).backward()
    # float32 against float64 over some hundred terms.
    assert found == pytest.approx(float(exact.detach()), rel=1e-4) and found > 1e-3
    assert ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, checkpoint.trainable(sft.model)[name].grad, rtol=1e-3, atol=1e-5)


def test_penalties_join_the_gradient_of_an_update_and_its_row(tiny_causal):
    config = config_for(
        {"source": "x", "ewc": 5.0, "distil_from_base": 1.0}, adapter={"kind": "full"}, max_grad_norm=1e9
    )
    sft = opened(tiny_causal, config)
    retained = retention.Retained([sft.encode(r) for r in old(2)], [sft.encode(r) for r in old(2)])
    batch = [[sft.encode(row) for row in new(3)]]
    plain = gradients(sft, batch, config, "float32")
    holding.hold(sft, retained, config, holding.nullcontext)
    held = gradients(sft, batch, config, "float32")
    # At the base both are 0, and so are their gradients, but for rounding.
    assert held["ewc_penalty"] == 0 and abs(held["base_divergence"]) < 1e-5
    assert held["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    with torch.no_grad():
        for weight in checkpoint.trainable(sft.model).values():
            weight += 0.3
    assert gradients(sft, batch, config, "float32")["ewc_penalty"] > 0


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_that_cannot_be_used_are_named(tiny_causal, tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}, {"prompt": "q"}, 3])
    (tmp_path / "b.jsonl").write_text("{\n\n")
    config = config_for({"source": str(tmp_path)})
    with pytest.raises(
        TuneyardError, match=r"3 unusable lines: a.jsonl:2 lacks completion or messages; a.jsonl:3 is"
    ):
        retention.read(config, SimpleNamespace())
    with pytest.raises(TuneyardError, match="nothing is there"):
        retention.read(config_for({"source": str(tmp_path / "none")}), SimpleNamespace())
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "a.jsonl", [{"prompt": f"q {n}", "completion": "a"} for n in range(9)])
    config = config_for({"source": str(tmp_path / "c"), "judged_examples": 3})
    sft = opened(tiny_causal, config)
    retained = retention.encode(sft, retention.read(config, SimpleNamespace()), config)
    assert (len(retained.judged), len(retained.kept)) == (3, 6)
    assert not {tuple(e.prompt) for e in retained.judged} & {tuple(e.prompt) for e in retained.kept}


def test_a_classifier_has_no_base_that_predicts():
    with pytest.raises(ValidationError, match="needs a base that predicts what classification trains"):
        config_for({"source": "x", "distil_from_base": 1.0}, objective="classification")


PPO = {"kind": "ppo", "reward_model": "r"}
GROUP = {"rewards": [{"kind": "answer"}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": PPO}, r"retain.ewc \(2\) .* ppo is given prompts, .*: use retain.replay, and objec"),
        ({"objective": {"kind": "grpo", **GROUP}}, "grpo is given prompts"),
        ({"objective": {"kind": "rloo", **GROUP}}, "rloo is given prompts"),
        ({"objective": "contrastive"}, "that of contrastive comes from the other pairs .*: use retain"),
        ({"adapter": "prompt"}, "of adapter prompt begin at random, .* or retain.distil_from_base"),
        ({"adapter": "prefix", "objective": "classification"}, "is no base: use retain.replay$"),
    ],
)
def test_what_tells_no_fisher_information_is_refused(changes, said):
    retain = {"source": "x", "replay": 0.1}
    assert config_for(retain, **changes).retain.replay == 0.1
    with pytest.raises(ValidationError) as refused:
        config_for(retain | {"ewc": 2.0}, **changes)
    (fault,) = refused.value.errors()
    assert re.search(said, fault["msg"])


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p_tuning_v2", "lora", "ia3"])
def test_the_base_under_an_adapter_is_the_base_and_no_copy_of_it(knowing, kind):
    config = config_for(adapter={"kind": kind})
    sft, true = opened(knowing, config), Sft(knowing, "float32")
    sft.model.eval()
    true.model.eval()
    batch = [sft.encode(row) for row in old(5)]
    with torch.no_grad():
        for weight in checkpoint.trainable(sft.model).values():
            weight += 0.1 * torch.randn_like(weight)  # the base is asked after the adapter has moved, too
        expected, behind = (each.outputs(batch)[0] for each in (true, sft))
    base = holding.Base(sft.model)
    with base.weights():
        found = sft.outputs(batch)[0]
    # The same sums, in another layout of the rows for a soft prompt.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(behind, expected, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(sft.outputs(batch)[0], behind)  # and then its adapter is back
    assert not base._copy


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p_tuning_v2"])
def test_the_losses_before_the_first_step_are_those_of_the_base(knowing, tmp_path, kind):
    config = config_for({"source": "x"}, adapter={"kind": kind}, max_steps=1, learning_rate=1e-9)
    sft, true = opened(knowing, config), Sft(knowing, "float32")
    watched, kept = [sft.encode(row) for row in new(4)], [sft.encode(row) for row in old(8)]
    holding.hold(sft, retention.Retained(kept[:4], kept[4:]), config, holding.nullcontext)
    found = fit(sft, watched, watched, config, "float32", tmp_path, lambda *_: None)
    # float32, the rows padded in another way.
    assert found.base_loss == pytest.approx(eval_loss(true, watched, config, "float32"), rel=1e-5)
    assert found.base_retention_loss == pytest.approx(eval_loss(true, kept[:4], config, "float32"), rel=1e-5)
    # What it is judged by afterwards is read behind the prompt, which has hardly moved.
    assert abs(found.history[-1]["eval_loss"] - found.base_loss) > 1e-4


@pytest.fixture(scope="module")
def knowing(tiny_causal, tmp_path_factory):
    """A tiny model that can answer the old prompts: one that has something to forget."""
    config = config_for(max_steps=80, learning_rate=1e-2, adapter={"kind": "full"})
    sft = opened(tiny_causal, config)
    encoded = [sft.encode(row) for row in old(16)]
    result = fit(sft, encoded, encoded[:4], config, "float32", tmp_path_factory.mktemp("k"), lambda *_: None)
    assert result.best_loss < 0.5
    folder = tmp_path_factory.mktemp("knowing")
    sft.model.set_attn_implementation("eager")
    sft.model.save_pretrained(folder)
    sft.tokenizer.save_pretrained(folder)
    return folder


def test_a_model_forgets_and_less_so_when_it_is_held(knowing, tmp_path):
    ways = {
        "none": {},
        "replay": {"replay": 0.2},
        # A model that is sure of its answers has small gradients, so its Fisher information is small too.
        "ewc": {"ewc": 1e6},
        "distil": {"distil_from_base": 1.0},
    }
    increase, learnt = {}, {}
    for way, settings in ways.items():
        config = config_for(
            {"source": "x", "judged_examples": 4, **settings},
            max_steps=30,
            learning_rate=5e-3,
            adapter={"kind": "full"},
        )
        sft = opened(knowing, config)
        encoded = [sft.encode(row) for row in old(16)]
        holding.hold(sft, retention.Retained(encoded[:4], encoded[4:]), config, holding.nullcontext)
        train = [sft.encode(row) for row in new(12)]
        result = fit(sft, train, train[:4], config, "float32", tmp_path / way, lambda *_: None)
        found = retention.figures(result.history, result.best_step, result.base_retention_loss)
        assert found["base_retention_loss"] < 0.5
        increase[way], learnt[way] = found["retention_loss_increase"], result.base_loss - result.best_loss
    assert increase["none"] > 1
    for way in ("replay", "ewc", "distil"):
        assert increase[way] < 0.5 * increase["none"], increase
        assert learnt[way] > 0.5 * learnt["none"], learnt


def test_the_stage_measures_forgetting_and_the_card_tells_it(tiny_causal, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    bare = ({name: row[name] for name in ("prompt", "completion")} for row in old(12))
    source = write(tmp_path / "old.jsonl", bare)
    config = config_for(
        {"source": str(source), "judged_examples": 4, "replay": 0.2, "ewc": 1.0, "distil_from_base": 0.1},
        max_steps=4,
        base_model=str(tiny_causal),
        learning_rate=1e-3,
        adapter={"kind": "full"},
    )
    inputs = {}
    for side, rows in (("train", new(12)), ("eval", new(4))):
        (tmp_path / side).mkdir()
        write(tmp_path / side / "examples.jsonl", rows)
        inputs[side] = Artifact(SimpleNamespace(digest=side), tmp_path / side)
    context = Context("run", "tiny", "train", "k" * 64, None, tmp_path / "out", tmp_path / "work")
    context.out.mkdir()
    result = stage.train(config, inputs, context)
    rows = [json.loads(line) for line in (tmp_path / "out/ledger/history.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "retention_loss" in row]
    assert [row["step"] for row in judged] == [0, 1, 2, 3, 4] and "ewc_penalty" in rows[-1]
    best = judged[result.summary["best_step"]]["retention_loss"]
    card = ModelCard.read(tmp_path / "out" / "model")
    assert card.retention["retention_loss"] == best == result.metrics["retention_loss"]
    assert card.retention["retention_loss_increase"] == best - judged[0]["retention_loss"]
    assert "retention_loss" in result.page.read_text()


def test_files_of_a_retention_set_are_found_beside_it(tmp_path):
    (tmp_path / "kept").mkdir()
    rows = [{"image": f"pictures/{i}.png", "label": "ab"[i % 2]} for i in range(4)]
    jsonl.write(tmp_path / "kept" / "rows.jsonl", rows)
    config = TrainConfig(
        objective="image-classification", base_model="base", retain={"source": str(tmp_path / "kept")}
    )
    found = [row["image"] for row in retention.read(config, None)]
    assert found == [str(tmp_path / "kept" / row["image"]) for row in rows]


def test_a_retention_text_beyond_the_models_positions_is_refused(tiny_encoder):
    config = TrainConfig(
        objective="classification", base_model=str(tiny_encoder), max_length=512, retain={"source": "none"}
    )
    rows = [
        {"id": str(i), "text": "profit " * (300 if i == 5 else 3), "label": "ab"[i % 2]} for i in range(8)
    ]
    objective = open_objective(config, rows, tiny_encoder)
    with pytest.raises(StageStopped, match="302 tokens, the base model reads 128"):
        retention.encode(objective, rows, config)
    retention.encode(objective, [row for row in rows if row["id"] != "5"], config)
