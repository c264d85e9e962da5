"""Adapters: each learns, moves exactly its weights, is saved and read back, and resumes bit for bit."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from components.shared import addons, causal, families, generation, nf4, opening, sources
from components.shared.errors import TuneyardError
from components.shared.modelcard import BaseModelRef, ModelCard
from components.train import checkpoint, saving
from components.train.adapters import applying
from components.train.adapters.applying import apply_adapter, weight_counts
from components.train.adapters.config import KINDS
from components.train.config import TrainConfig
from components.train.data import schedule_batches
from components.train.fit import fit
from components.train.objectives.base import choose_attention
from components.train.objectives.classification import Classification
from components.train.objectives.opening import computed_in, held_in
from components.train.objectives.sft import Sft

# Rates at which a random model of 40,000 weights learns in a hundred updates; a real one wants far less.
RATES = {
    "full": 3e-3,
    "progressive": 5e-3,
    "rslora": 3e-3,
    "ia3": 0.1,
    "prompt": 0.3,
    "prefix": 0.05,
    "p_tuning_v2": 0.1,
}
SPELT = {
    "full": {"kind": "full"},
    "last_layers": {"kind": "last_layers", "layers": 1},
    "progressive": {"kind": "progressive", "layer_decay": 0.95},
    "lora": {"kind": "lora", "rank": 4},
    "rslora": {"kind": "lora", "rank": 4, "rslora": True},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "qlora": {"kind": "qlora", "rank": 4},
    "ia3": {"kind": "ia3"},
    "houlsby": {"kind": "houlsby", "size": 8},
    "pfeiffer": {"kind": "pfeiffer", "size": 8},
    "prefix": {"kind": "prefix", "tokens": 5, "projection": 16},
    "prompt": {"kind": "prompt", "tokens": 5},
    "p_tuning_v2": {"kind": "p_tuning_v2", "tokens": 5},
}
every_adapter = pytest.mark.parametrize("name", SPELT)
# Seventy short trainings, some in PEFT, which takes seconds to import.
pytestmark = pytest.mark.slow
each_task = pytest.mark.parametrize("task", ["sft", "classification"])


def test_every_kind_is_tried_here():
    assert {spelt["kind"] for spelt in SPELT.values()} == KINDS.keys()


def settings_for(task, name, base, **changes):
    kind = SPELT[name]["kind"]
    slow = KINDS[kind].beside or kind == "ia3"
    base_settings = {
        "objective": task,
        "base_model": str(base),
        "adapter": SPELT[name],
        "learning_rate": 0.03 if task != "sft" and slow else RATES.get(name, 1e-2),
        "max_length": 64,
        "max_steps": 30,
        "per_device_batch_size": 8,
        "dropout": 0.0,
        "early_stopping": None,
        "eval_steps": 20,
        "precision": "float32",
    }
    return TrainConfig(**(base_settings | changes))


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_causal, tiny_encoder):
    """The tiny models with five times their weights: as they are made, they hardly tell two texts apart."""
    made = {}
    for task, folder, kind in (
        ("sft", tiny_causal, AutoModelForCausalLM),
        ("classification", tiny_encoder, AutoModel),
    ):
        made[task] = tmp_path_factory.mktemp(task) / "base"
        shutil.copytree(folder, made[task])
        model = kind.from_pretrained(folder)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(5 if weight.ndim > 1 else 1)
        model.save_pretrained(made[task])
    return made


@pytest.fixture
def made(bases):
    """Make (config, objective with its adapter, encoded examples) of a task and an adapter."""

    def make(task, name, **changes):
        base = bases[task]
        config = settings_for(task, name, base, **changes)
        torch.manual_seed(0)
        if task == "sft":
            objective = Sft(base, held_in(config))
            choose_attention(objective, config.max_length)
            rows = [
                {"prompt": f"question {i % 3}", "completion": "合同自成立时生效" * (1 + i % 2)}
                for i in range(24)
            ]
        else:
            objective = Classification(base, ["down", "up"])
            words = {"up": "profit rose", "down": "rent fell due"}
            # Of mixed lengths, or a batch, cut from neighbours in length, would hold one label alone.
            rows = [
                {"text": f"{words[label]} {'the contract ' * (i % 6)}", "label": label}
                for i in range(12)
                for label in words
            ]
        random.Random(0).shuffle(rows)
        apply_adapter(objective, config)
        return config, objective, [objective.encode(row) for row in rows]

    return make


def trained(made, folder, task, name, **changes):
    config, objective, encoded = made(task, name, **changes)
    state = fit(objective, encoded[:20], encoded[20:], config, "float32", folder, lambda *_: None)
    return config, objective, encoded, state


def plain(name):
    """A weight's name in the base, without PEFT's wrapping."""
    return name.replace("base_model.model.", "").replace(".base_layer", "").replace(".original_module", "")


@each_task
@every_adapter
def test_it_learns_and_moves_exactly_its_weights(made, tmp_path, task, name):
    config, objective, encoded = made(task, name, max_steps=120)
    steps = len(schedule_batches([len(e) for e in encoded[:20]], config))
    moving, total = weight_counts(objective, config, steps)
    before = {n: w.detach().clone() for n, w in objective.model.named_parameters()}
    promised = set(checkpoint.trainable(objective.model))
    if name in ("full", "progressive"):
        assert promised == before.keys()
    assert moving == sum(before[n].numel() for n in promised) <= total
    state = fit(objective, encoded[:20], encoded[:20], config, "float32", tmp_path, lambda *_: None)
    # On what it was fitted to: whether two dozen texts generalise is not asked of a random model.
    assert state.best_loss < 0.95 * state.base_loss
    moved = {n for n, w in objective.model.named_parameters() if not torch.equal(before[n], w)}
    # Not a subset alone: a part of an adapter that nothing flows through would be a silent defect. Rows of
    # the tables for positions and words that do not occur have no gradient, but the tables do.
    assert moved == promised


@each_task
@every_adapter
def test_what_is_saved_answers_as_what_was_trained(made, tmp_path, task, name):
    config, objective, encoded, _ = trained(made, tmp_path / "work", task, name, max_steps=6)
    base = BaseModelRef(
        uri=config.base_model, fingerprint=sources.fingerprint(config.base_model, None, "model")
    )
    before = answers(objective.model, objective, encoded)
    quantised = name == "qlora"
    if quantised:
        # What comes out stands on the unquantised base; NF4's own error is test_nf4's matter.
        nf4.restore(families.body(objective.model), AutoModel.from_pretrained(config.base_model))
        before = answers(objective.model, objective, encoded)
        config, objective, encoded, _ = trained(made, tmp_path / "again", task, name, max_steps=6)
    card = saving.card(objective, config, base, (1, 2), "")
    saving.save(objective, config, card, tmp_path / "model")
    assert card == ModelCard.read(tmp_path / "model") and card.quantised == ("nf4" if quantised else None)
    if task == "sft":
        again, _, _ = causal.load(tmp_path / "model", None, "float32")
    else:
        again = opening.tuned(tmp_path / "model", None, AutoModelForSequenceClassification)
    # Equal where nothing is merged; a merged product is summed in another order.
    torch.testing.assert_close(answers(again, objective, encoded), before, rtol=1e-4, atol=2e-5)
    untuned = answers(opened_base(objective, config), objective, encoded)
    assert (before - untuned).abs().max() > 1e-3
    if card.layout == "addon":
        assert {p.name for p in (tmp_path / "model").glob("*.safetensors")} == {addons.WEIGHTS}


def opened_base(objective, config):
    kind = AutoModelForCausalLM if objective.task == "causal-lm" else AutoModelForSequenceClassification
    torch.manual_seed(0)
    return kind.from_pretrained(config.base_model)


def answers(model, objective, encoded):
    """Losses of some examples, or logits: what a reader of the model sees."""
    model.eval()
    if objective.task == "causal-lm":
        return torch.tensor(causal.answer_nats(model, encoded[:6]))
    with torch.inference_mode():
        ids = [e.ids for e in encoded[:6]]
        return model(**objective.tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits


@every_adapter
def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(made, tmp_path, name):
    changes = {"max_steps": 10, "checkpoint_steps": 4, "eval_steps": 3}
    _, whole, _, state = trained(made, tmp_path / "whole", "sft", name, **changes)
    config, cut, encoded = made("sft", name, **changes)
    loss, calls = cut.summed_loss, []

    def until_the_seventh(batch, smoothing):
        calls.append(cut.model.training)
        if sum(calls) > 6:
            raise KeyboardInterrupt
        return loss(batch, smoothing)

    cut.summed_loss = until_the_seventh
    with pytest.raises(KeyboardInterrupt):
        fit(cut, encoded[:20], encoded[20:], config, "float32", tmp_path / "cut", lambda *_: None)
    _, resumed, _, again = trained(made, tmp_path / "cut", "sft", name, **changes)
    wanted = checkpoint.copy_weights(whole.model)
    found = checkpoint.copy_weights(resumed.model)
    assert wanted.keys() == found.keys() and wanted
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert [row["loss"] for row in again.history] == [row["loss"] for row in state.history]


@pytest.mark.parametrize("name", [n for n in SPELT if KINDS[SPELT[n]["kind"]].beside])
def test_answers_of_a_batch_are_those_of_one_prompt_at_a_time(made, tmp_path, name):
    # The cache, the padding and the virtual tokens must find each other.
    _, objective, encoded, _ = trained(made, tmp_path, "sft", name, max_steps=6)
    prompts = [e.prompt[: 3 + 4 * i] for i, e in enumerate(encoded[:4])]
    model = objective.model.eval()
    model.set_attn_implementation("eager")  # as it is loaded to answer
    together = generation.generate(model, prompts, set(), 6, 4)
    alone = [generation.generate(model, [prompt], set(), 6, 1)[0] for prompt in prompts]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    for prompt, answer in zip(prompts, alone, strict=True):
        ids = list(prompt)
        for token in answer.tokens:  # without a cache at all
            with torch.inference_mode():
                body, head, _ = causal.body_and_head(model)
                states = body(input_ids=torch.tensor([ids]), use_cache=False)[0]
            ids.append(int(head(states[0, -1]).argmax()))
            assert ids[-1] == token
    # To the digit, too: padded on the left, with positions and a cache given, as answers are made.
    ids = torch.tensor([[0, 0, *prompts[3]]])
    mask = (ids.cumsum(1) > 0).long()
    with torch.inference_mode():
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        cached = body(
            input_ids=ids, **given, past_key_values=DynamicCache(config=model.config), use_cache=True
        )
        plain = body(input_ids=ids[:, 2:], use_cache=False)
    torch.testing.assert_close(cached[0][:, 2:], plain[0], rtol=1e-4, atol=1e-5)


def test_word_vectors_are_learned_in_float32_unless_the_file_says_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for name, precision, expected in (
        ("prompt", "auto", "float32"),
        ("prompt", "bfloat16", "bfloat16"),
        ("prefix", "auto", "bfloat16"),
    ):
        config = settings_for("sft", name, "tiny", precision=precision)
        assert computed_in(config) == held_in(config) == expected


def test_too_large_an_adapter_is_refused(made, monkeypatch):
    config, objective, _ = made("sft", "lora")
    assert weight_counts(objective, config, 10)[0] > 0
    monkeypatch.setattr(applying, "_TINY_WEIGHTS", 0)
    with pytest.raises(TuneyardError, match=r"adapter lora moves .* at most 10%"):
        weight_counts(objective, config, 10)


@pytest.mark.parametrize(
    "name", ["ia3", "dora", "qlora", "houlsby", "pfeiffer", "prefix", "prompt", "p_tuning_v2"]
)
def test_in_bfloat16_it_computes_what_it_does_in_float32_but_for_rounding(made, tmp_path, name):
    config, objective, encoded = made("sft", name, max_steps=4, precision="bfloat16")
    weights = checkpoint.trainable(objective.model)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    held = next(w for n, w in objective.model.named_parameters() if n not in weights)
    # Where weights of the base itself move, none of them may be rounded.
    assert held.dtype == (torch.float32 if name == "houlsby" else torch.bfloat16)
    fit(objective, encoded[:20], encoded[20:], config, "bfloat16", tmp_path / "work", lambda *_: None)
    fingerprint = sources.fingerprint(config.base_model, None, "model")
    base = BaseModelRef(uri=config.base_model, fingerprint=fingerprint)
    saving.save(objective, config, saving.card(objective, config, base, (1, 2), ""), tmp_path / "model")
    exact, rounded = (
        torch.tensor(causal.answer_nats(causal.load(tmp_path / "model", None, precision)[0], encoded[:6]))
        for precision in ("float32", "bfloat16")
    )
    # Eight bits of mantissa, over two layers and some dozen tokens.
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
