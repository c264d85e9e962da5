"""Train: masks, batches, lengths, accumulation, resume."""

from __future__ import annotations

import math
import os
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.shared import causal, chat
from components.shared.errors import StageStopped, TuneyardError
from components.train import checkpoint
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.data import fit_lengths, schedule_batches
from components.train.fit import fit
from components.train.objectives.base import Objective, choose_attention
from components.train.objectives.classification import Classification
from components.train.objectives.sft import Sft
from components.train.update import gradients as compute
from components.train.update import learning_rate

ORIGIN = {"file": "corpus.jsonl", "line": 7, "part": "main"}


def settings_for(**changes):
    base = {"objective": "sft", "base_model": "s3://models/tiny", "max_length": 128, "precision": "float32"}
    return TrainConfig(**(base | changes))


def examples(count):
    words = random.Random(0)
    return [
        {
            "id": str(i),
            "origin": ORIGIN,
            "prompt": f"question {i} " * words.randint(1, 4),
            "completion": f"合同 {i} " * words.randint(1, 5),
        }
        for i in range(count)
    ]


@pytest.fixture
def sft(tiny_causal):
    torch.manual_seed(0)
    return Sft(tiny_causal, "float32")


def test_only_answer_tokens_carry_loss(sft):
    encoded = [sft.encode(row) for row in examples(3)]
    labels = causal.pad(encoded, 0)["labels"]
    for row, one in zip(labels.tolist(), encoded, strict=True):
        assert [t for t in row if t != causal.IGNORED] == one.answer
        assert row[: len(one.prompt)] == [causal.IGNORED] * len(one.prompt)
        assert one.answer[-1] == sft.tokenizer.eos_token_id


def test_loss_equals_transformers_on_the_same_labels(sft):
    batch = causal.pad([sft.encode(row) for row in examples(4)], 0)
    mine = [sft.encode(row) for row in examples(4)]
    with torch.no_grad():
        reference = sft.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss
        ours = sft.summed_loss(mine, 0.0) / sum(map(sft.terms, mine))
    assert float(ours) == pytest.approx(float(reference), rel=1e-5)
    assert sum(causal.answer_nats(sft.model, mine)) / causal.token_count(mine) == pytest.approx(
        float(ours), rel=1e-5
    )


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 5], [1] * 6])
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(tiny_causal, sizes):
    encoded = None
    gradients = []
    for split in ([6], sizes):
        sft = Sft(tiny_causal, "float32")
        config = settings_for(adapter={"kind": "full"}, max_grad_norm=1e9, learning_rate=1e-3)
        apply_adapter(sft, config)
        encoded = [sft.encode(row) for row in examples(6)]
        rest = iter(encoded)
        compute(sft, [[next(rest) for _ in range(size)] for size in split], config, "float32")
        gradients.append({n: p.grad.clone() for n, p in sft.model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        # The same sums in another order and padding: float32 rounding only.
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=90),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_every_example_comes_up_once_an_epoch_and_the_partial_group_is_not_dropped(
    lengths, size, accumulate, epochs
):
    config = settings_for(per_device_batch_size=size, gradient_accumulation_steps=accumulate, epochs=1)
    steps = schedule_batches(lengths, config)
    seen = [i for step in steps for micro in step for i in micro]
    assert sorted(seen) == list(range(len(lengths)))
    assert len(steps) == math.ceil(len(lengths) / (size * accumulate))
    assert all(len(micro) <= size for step in steps for micro in step)
    longer = settings_for(per_device_batch_size=size, gradient_accumulation_steps=accumulate, epochs=epochs)
    assert (
        schedule_batches(lengths, longer)[: len(steps)] == steps
        or epochs == 1
        or len(lengths) % (size * accumulate)
    )


def test_over_long_examples_are_counted_and_an_answer_is_never_cut(sft):
    rows = [*examples(20), {"id": "long", "origin": ORIGIN, "prompt": "a b c d " * 60, "completion": "合同"}]
    rows.append({"id": "answer", "origin": ORIGIN, "prompt": "q", "completion": "合同" * 400})
    config = settings_for(over_length="truncate_prompt", max_over_length=0.2)
    kept, ledger = fit_lengths(rows, sft.encode, sft.shorten, config)
    assert ledger.counts == {"kept": 20, "cut": 1, "dropped": 1}
    assert len(kept) == 21 and max(map(len, kept)) <= 128
    assert kept[-1].answer == sft.encode(rows[20]).answer
    prompt, short = sft.encode(rows[20]).prompt, kept[-1].prompt
    assert prompt[0] == short[0] == sft.tokenizer.bos_token_id and short[1:] == prompt[1 - len(short) :]
    whole = sum(len(sft.encode(row)) for row in rows)
    assert ledger.tokens["kept"] + ledger.tokens["removed"] == whole
    assert {row["id"]: row["action"] for row in ledger.rows} == {"long": "cut", "answer": "dropped"}
    for policy, allowed in (("error", 1.0), ("drop", 0.05)):
        with pytest.raises(StageStopped, match=r"2 of 22 examples .*corpus.jsonl:7"):
            fit_lengths(
                rows, sft.encode, sft.shorten, settings_for(over_length=policy, max_over_length=allowed)
            )


@given(st.lists(st.integers(2, 9), min_size=1), st.integers(1, 12), st.sampled_from([None, 1]))
def test_a_cut_prompt_is_the_end_behind_its_first_token(tail, room, bos_id):
    prompt = [1, *tail]
    cut = causal.cut_prompt(prompt, room, bos_id)
    assert len(cut) == min(room, len(prompt))
    kept_head = bos_id == 1 and room > 1
    assert cut[kept_head:] == prompt[len(prompt) - len(cut) + kept_head :]
    assert not kept_head or cut[0] == 1


def test_learning_rate_warms_up_and_falls_to_its_floor():
    config = settings_for(learning_rate=1e-3, min_learning_rate=1e-5, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[9] == pytest.approx(1e-3) and max(rates) == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 1e-5 <= rates[-1] < 2e-5


def test_a_linear_decay_is_that_of_transformers():
    from transformers import get_linear_schedule_with_warmup

    config = settings_for(learning_rate=1e-3, min_learning_rate=0.0, warmup_fraction=0.1, decay="linear")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_linear_schedule_with_warmup(optimizer, 10, 100)
    for step in range(100):
        if step >= 10:  # its warm-up begins at nothing, ours one update further up
            assert learning_rate(step, 100, config) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


class Killed(BaseException):
    """Ends a fit as SIGKILL does: nothing is done about it."""


def _trained(tiny_causal, folder, config, crash_after=None, how=Killed, saved=lambda path: None):
    sft = Sft(tiny_causal, "float32")
    torch.manual_seed(config.seed)
    apply_adapter(sft, config)
    encoded = [sft.encode(row) for row in examples(24)]
    calls = {"n": 0}
    if crash_after is not None:
        original = sft.summed_loss

        def counted(batch, smoothing):
            calls["n"] += sft.model.training
            if calls["n"] > crash_after:
                raise how
            return original(batch, smoothing)

        sft.summed_loss = counted
    state = fit(sft, encoded[:20], encoded[20:], config, "float32", folder, lambda *_: None, saved=saved)
    return checkpoint.copy_weights(sft.model), state


@pytest.mark.parametrize("how", [Killed, KeyboardInterrupt])
@pytest.mark.parametrize("crash_after", [3, 7, 12])
def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(
    tiny_causal, tmp_path, crash_after, how
):
    config = settings_for(
        epochs=3, per_device_batch_size=4, checkpoint_steps=3, eval_steps=5, learning_rate=1e-3
    )
    whole, state = _trained(tiny_causal, tmp_path / "whole", config)
    with pytest.raises(how):
        _trained(tiny_causal, tmp_path / "cut", config, crash_after, how)
    if how is KeyboardInterrupt:
        assert (tmp_path / "cut" / f"step-{crash_after}").exists()
    resumed, again = _trained(tiny_causal, tmp_path / "cut", config)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row["loss"] for row in again.history] == [row["loss"] for row in state.history]
    assert state.history[-1]["loss"] < state.history[0]["loss"]
    assert state.best_loss < state.base_loss == again.base_loss


def test_a_damaged_checkpoint_is_passed_over(tiny_causal, tmp_path, caplog):
    config = settings_for(epochs=3, per_device_batch_size=4, checkpoint_steps=3, learning_rate=1e-3)
    with pytest.raises(Killed):
        _trained(tiny_causal, tmp_path, config, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3", "step-6", "step-9"]
    weights = tmp_path / "step-9" / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    found = checkpoint.newest(tmp_path)
    assert found and found[0].name == "step-6" and "step-9" in caplog.text
    # The training comes by there again: what is written then takes the damaged one's place.
    with pytest.raises(Killed):
        _trained(tiny_causal, tmp_path, config, 4)
    found = checkpoint.newest(tmp_path)
    assert found and found[0].name == "step-9" and not list(tmp_path.glob(".*"))
    resumed, _ = _trained(tiny_causal, tmp_path, config)
    whole, _ = _trained(tiny_causal, tmp_path / "whole", config)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("at", ["written", "stored"])
def test_an_interruption_within_a_save_loses_no_update(tiny_causal, tmp_path, monkeypatch, at):
    """Whether a file of the checkpoint is being written then, or the whole is on its way to the store."""
    config = settings_for(epochs=3, per_device_batch_size=4, checkpoint_steps=3, learning_rate=1e-3)
    stored, begun = [], {"written": 0, "stored": 0}

    def interrupt(place, second):
        begun[place] += 1
        if place == at and begun[place] == second:
            raise KeyboardInterrupt

    def sync(descriptor, real=os.fsync):
        interrupt("written", 8)  # one of the second checkpoint: each has four files or five, and a folder
        real(descriptor)

    def store(path):
        interrupt("stored", 2)
        stored.append(path.name)

    monkeypatch.setattr(checkpoint.os, "fsync", sync)
    with pytest.raises(KeyboardInterrupt):
        _trained(tiny_causal, tmp_path, config, saved=store)
    assert checkpoint.newest(tmp_path)[0].name == "step-6"
    assert stored == ["step-3", "step-6"]


def test_the_base_stays_as_it_was_under_lora(tiny_causal, tmp_path):
    config = settings_for(epochs=1, learning_rate=1e-2)
    sft = Sft(tiny_causal, "float32")
    before = {n: p.clone() for n, p in sft.model.named_parameters()}
    apply_adapter(sft, config)
    encoded = [sft.encode(row) for row in examples(8)]
    fit(sft, encoded, encoded, config, "float32", tmp_path, lambda *_: None)
    after = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p
        for n, p in sft.model.named_parameters()
    }
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert any("lora_B" in n and bool(p.abs().max() > 0) for n, p in sft.model.named_parameters())


class Broken(Objective):
    """Its loss is no number."""

    def __init__(self):
        self.model = torch.nn.Linear(1, 1)

    packs = False

    def encode(self, example):
        return [1]

    def shorten(self, encoded, max_length):
        return None

    def terms(self, encoded):
        return 1

    def summed_loss(self, batch, label_smoothing):
        return self.model(torch.ones(1)).sum() * math.nan


def test_a_loss_that_is_not_finite_stops_with_what_to_do():
    with pytest.raises(TuneyardError, match="the loss is nan in float32"):
        compute(Broken(), [[1]], settings_for(), "float32")


@pytest.mark.parametrize("dropout", [None, 0.0, 0.3])
def test_the_bases_own_dropout_is_what_was_asked_for(tiny_causal, tiny_encoder, dropout):
    for model in (
        Sft(tiny_causal, "float32", dropout).model,
        Classification(tiny_encoder, ["a", "b"], dropout).model,
    ):
        found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        # In a Bert they are layers; in a decoder such as this one attention's share is a plain number.
        found |= {
            module.attention_dropout for module in model.modules() if hasattr(module, "attention_dropout")
        }
        usual = 0.0 if hasattr(model.config, "attention_dropout") else 0.1
        assert found == {usual if dropout is None else dropout}


def test_plain_attention_gives_the_gradient_of_fused_attention(sft):
    batch = [sft.encode(row) for row in examples(5)]
    apply_adapter(sft, settings_for(adapter={"kind": "full"}))
    gradients = []
    for attention in ("sdpa", "eager"):
        sft.model.set_attn_implementation(attention)
        sft.model.zero_grad()
        sft.summed_loss(batch, 0.0).backward()
        gradients.append([w.grad.clone() for w in sft.model.parameters()])
    for fused, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-3, atol=1e-4)  # float32 in another order


def test_a_long_run_of_an_encoder_keeps_the_attention_whose_memory_is_linear(tiny_encoder):
    objective = Classification(tiny_encoder, ["a", "b"])
    choose_attention(objective, 8192)
    assert objective.model.config._attn_implementation == "sdpa" and not objective.packs
    choose_attention(objective, 512)
    assert objective.model.config._attn_implementation == "eager"


def test_classification_cuts_as_the_tokenizer_does(tiny_encoder):
    objective = Classification(tiny_encoder, ["a", "b"])
    encoded = objective.encode({"text": "the company said profit rose " * 20, "label": "b"})
    ids = objective.tokenizer("the company said profit rose " * 20, truncation=True, max_length=32)[
        "input_ids"
    ]
    assert objective.shorten(encoded, 32).ids == ids and encoded.label == 1


def test_the_probe_tells_another_template(tiny_tokenizer):
    import copy

    tokenizer = chat.prepare(copy.deepcopy(tiny_tokenizer))
    stored = chat.probe(tokenizer)
    chat.verify_probe(tokenizer, stored, "here")
    tokenizer.chat_template = chat.PLAIN_TEMPLATE.replace("'\\n'", "'  '")
    with pytest.raises(TuneyardError, match="other token ids than in training, first at"):
        chat.verify_probe(tokenizer, stored, "here")
