"""Preference objectives: the loss of the papers, the base as the reference, pairs that teach."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import logsigmoid

from components.shared import causal, rewards
from components.shared.errors import StageStopped
from components.shared.loss import token_cross_entropy
from components.train import checkpoint, holding, retention
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives import pairs
from components.train.objectives.config import DpoObjective, RewardObjective
from components.train.objectives.dpo import Dpo
from components.train.objectives.opening import open_objective
from components.train.objectives.reward import Reward
from components.train.update import gradients

ORIGIN = {"file": "pairs.jsonl", "line": 7, "part": "main"}


def rows(count, **changes):
    return [
        {
            "id": str(i),
            "origin": ORIGIN,
            "prompt": f"question {i} " * (1 + i % 3),
            "chosen": "合同自成立时生效" + "。" * (i % 4),
            "rejected": "the company said" + " profit" * (i % 5),
            **changes,
        }
        for i in range(count)
    ]


def settings_for(objective, **changes):
    base = {"base_model": "tiny", "max_length": 128, "precision": "float32", "per_device_batch_size": 4}
    return TrainConfig(**(base | {"objective": objective} | changes))


def dpo(folder, **settings):
    return Dpo(folder, "float32", DpoObjective(kind="dpo", **settings))


def prepared(objective, count=6, **changes):
    encoded = [objective.encode(row) for row in rows(count, **changes)]
    objective.prepare(encoded, nullcontext)
    return encoded


@pytest.fixture(scope="module")
def coarse(tiny_causal, tmp_path_factory):
    """The tiny model with five times its weights: as it is made, it hardly tells two texts apart."""
    folder = tmp_path_factory.mktemp("coarse")
    model, tokenizer = causal.open_folder(tiny_causal, "float32", None)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def moved(model, scale=0.05):
    """Other weights than the base's, so that no log-ratio is 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(scale * torch.randn_like(weight))


def whole_log_likelihoods(model, encoded):
    """The log-likelihood of each answer from whole logits in float64, one sequence at a time."""
    found = []
    for pair in encoded:
        for sequence in pair.sequences:
            ids = torch.tensor([[*sequence.prompt, *sequence.answer]])
            logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
            at = range(len(sequence.prompt) - 1, len(sequence) - 1)
            found.append(sum(logits[i, t] for i, t in zip(at, sequence.answer, strict=True)))
    return torch.stack(found)


def reference_loss(policy, base, lengths, *, beta, loss, margin=0.0, smoothing=0.0):
    """The formulas of the papers, over [2 x pairs] log-likelihoods with the chosen answer first."""
    ratios = policy - base
    if loss == "ipo":
        ratios = ratios / lengths
        return ((ratios[::2] - ratios[1::2] - 1 / (2 * beta)) ** 2).sum()
    odds = beta * (ratios[::2] - ratios[1::2]) - margin
    return (-(1 - smoothing) * logsigmoid(odds) - smoothing * logsigmoid(-odds)).sum()


CASES = {
    "plain": ({"beta": 0.1}, 0.0),
    "smoothed": ({"beta": 0.5}, 0.2),
    "margin": ({"beta": 0.3, "reward_margin": 0.7}, 0.0),
    "ipo": ({"beta": 0.4, "loss": "ipo"}, 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_dpo_is_the_papers_formula_on_whole_logits(tiny_causal, case):
    settings, smoothing = CASES[case]
    objective = dpo(tiny_causal, **settings)
    encoded = prepared(objective)
    model = objective.model.double()
    with torch.no_grad():
        base = whole_log_likelihoods(model, encoded)
    moved(model)
    lengths = torch.tensor([len(s.answer) for pair in encoded for s in pair.sequences])
    chosen = {"beta": 0.1, "loss": "sigmoid"} | settings
    expected = reference_loss(
        whole_log_likelihoods(model, encoded),
        base,
        lengths,
        beta=chosen["beta"],
        loss=chosen["loss"],
        margin=chosen.get("reward_margin", 0.0),
        smoothing=smoothing,
    )
    weights = list(model.parameters())
    exact = torch.autograd.grad(expected, weights)
    model.float()
    ours = objective.summed_loss(encoded, smoothing)
    found = torch.autograd.grad(ours, weights)
    # Ours is float32 and the base's part was rounded to it: six figures of sums of some twenty nats.
    assert float(ours.detach()) == pytest.approx(float(expected), rel=1e-4)
    assert abs(float(expected) - 6 * math.log(2)) > 0.01 or case == "ipo"
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_is_that_of_trl(tiny_causal, tmp_path, loss):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    objective = dpo(tiny_causal, beta=0.3, loss=loss)
    encoded = prepared(objective)
    moved(objective.model)
    arguments = DPOConfig(
        output_dir=str(tmp_path), beta=0.3, loss_type=[loss], report_to=[], use_cpu=True, bf16=False
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.float32),
        args=arguments,
        processing_class=objective.tokenizer,
        train_dataset=Dataset.from_list(
            [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows(6)]
        ),
    )
    trainer.model.eval()  # its reference stays the base
    trainer.model.load_state_dict(objective.model.state_dict())
    batch = trainer.data_collator(
        [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in encoded]
    )
    theirs = trainer.compute_loss(trainer.model, batch)
    ours = objective.summed_loss(encoded, 0.0) / len(encoded)
    # Both float32; sums of some tens of log-probabilities in another order.
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-4)
    assert abs(float(theirs.detach()) - math.log(2)) > 0.01


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_a_weighted_sum_of_token_losses_has_torchs_gradients(bias, cap):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 97, bias=bias)
    hidden = torch.randn(300, 16, requires_grad=True)
    targets, weights = torch.randint(0, 97, (300,)), torch.randn(300)
    logits = torch.tanh(head(hidden) / cap) * cap if cap else head(hidden)
    reference = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    ours = token_cross_entropy(hidden, head, cap, targets)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    inputs = [hidden, *head.parameters()]
    expected = torch.autograd.grad((reference * weights).sum(), inputs)
    found = torch.autograd.grad((ours * weights).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        # float32 sums of 300 terms in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    head.requires_grad_(False)
    token_cross_entropy(hidden, head, cap, targets).sum().backward()
    assert head.weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_begins_at_the_base_and_the_first_loss_is_log_two(tiny_causal, kind):
    objective = dpo(tiny_causal)
    encoded = prepared(objective)
    apply_adapter(objective, settings_for("dpo", adapter={"kind": kind}))
    loss = objective.summed_loss(encoded, 0.0)
    assert float(loss) / len(encoded) == pytest.approx(math.log(2), abs=1e-5)


def test_under_qlora_the_reference_is_the_quantised_base_that_the_training_starts_from(tiny_causal, coarse):
    config = settings_for("dpo", adapter={"kind": "qlora"})
    objective, whole = open_objective(config, rows(6), coarse), dpo(coarse)
    encoded, unquantised = prepared(objective), prepared(whole)
    apply_adapter(objective, config)
    loss = objective.summed_loss(encoded, 0.0)
    assert float(loss) / len(encoded) == pytest.approx(math.log(2), abs=1e-6)
    quantised, given = (torch.tensor([pair.reference for pair in each]) for each in (encoded, unquantised))
    assert (quantised - given).abs().max() > 0.01  # NF4 is coarse enough to see


@pytest.mark.parametrize("kind", ["lora", "full", "prompt"])
def test_the_retention_set_too_is_measured_against_the_base(coarse, tmp_path, kind):
    retain = {"source": "x", "replay": 0.5} | ({} if kind == "prompt" else {"ewc": 1.0})
    config = settings_for("dpo", adapter={"kind": kind}, retain=retain, max_steps=3, learning_rate=1e-3)
    torch.manual_seed(0)
    objective = dpo(coarse)
    encoded = prepared(objective, 8)
    expected = [pair.reference for pair in prepared(dpo(coarse), 8)]
    apply_adapter(objective, config)
    kept = [objective.encode(row) for row in rows(8)]
    holding.hold(objective, retention.Retained(kept[:4], kept[4:]), config, nullcontext)
    for pair, reference in zip(kept, expected, strict=True):
        # Sums of some tens of float32 numbers, of rows padded in another way.
        assert pair.reference == pytest.approx(reference, rel=1e-5)
    state = fit(objective, encoded[:6], encoded[6:], config, "float32", tmp_path, lambda *_: None)
    assert state.base_retention_loss == pytest.approx(math.log(2), abs=1e-4)
    assert kind == "prompt" or state.history[-1]["ewc_penalty"] > 0


def test_a_reward_model_is_bradley_terry_with_its_centre(tiny_causal):
    settings = RewardObjective(kind="reward", reward_margin=0.3, score_weight=0.5, centre_weight=0.1)
    torch.manual_seed(0)
    objective = Reward(tiny_causal, settings)
    encoded = [objective.encode(row) for row in rows(6, chosen_score=3.0, rejected_score=1.0)]
    found = []
    for pair in encoded:
        for sequence in pair.sequences:
            ids = torch.tensor([[*sequence.prompt, *sequence.answer]])
            found.append(objective.model(input_ids=ids).logits[0, 0].double())
    chosen, rejected = torch.stack(found[::2]), torch.stack(found[1::2])
    margin = 0.3 + 0.5 * (3.0 - 1.0)
    expected = (-logsigmoid(chosen - rejected - margin) + 0.1 * (chosen + rejected) ** 2).sum()
    ours = objective.summed_loss(encoded, 0.0)
    assert float(ours) == pytest.approx(float(expected), rel=1e-4)  # float32 against float64
    weights = list(objective.model.parameters())
    exact = torch.autograd.grad(expected, weights)
    for one, other in zip(torch.autograd.grad(ours, weights), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


def test_a_reward_is_read_at_the_last_token_whatever_pads(tiny_causal):
    """transformers looks for the last token that is no padding: the wrong one where the end token pads."""
    torch.manual_seed(0)
    objective = Reward(tiny_causal, RewardObjective(kind="reward"))
    sequences = [s for row in rows(4) for s in objective.encode(row).sequences]
    alone = [rewards.of_sequences(objective.model, [s], 0) for s in sequences]
    end = objective.tokenizer.eos_token_id
    assert all(s.answer[-1] == end for s in sequences)
    together = rewards.of_sequences(objective.model, sequences, end)
    # The same sums in another order.
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_an_evaluation_of_eval_says_what_the_history_of_train_says(tiny_causal, tmp_path):
    config = settings_for("dpo", max_steps=12, eval_steps=4, learning_rate=5e-3, warmup_fraction=0.0)
    torch.manual_seed(0)
    objective = dpo(tiny_causal)
    encoded = prepared(objective, 16)
    apply_adapter(objective, config)
    state = fit(objective, encoded[:12], encoded[12:], config, "float32", tmp_path, lambda *_: None)
    first, last = state.history[0], state.history[-1]
    assert state.base_loss == pytest.approx(math.log(2), abs=1e-5) and state.best_loss < 0.9 * state.base_loss
    assert first["reward_margin"] == pytest.approx(0.0, abs=1e-4)
    assert last["reward_margin"] > 0.1 and last["pair_accuracy"] == 1.0
    assert last["reward_margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], abs=1e-5)
    judged = [row for row in state.history if "eval_loss" in row]
    assert len(judged) == 3 and all(0 <= row["eval_pair_accuracy"] <= 1 for row in judged)
    assert judged[-1]["eval_reward_margin"] > 0
    assert "eval_reward_margin" not in state.history[0]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_micro_batches_give_the_gradient_of_one_batch(tiny_causal, kind):
    both = []
    for sizes in ([6], [1, 2, 3]):
        torch.manual_seed(0)
        objective = dpo(tiny_causal) if kind == "dpo" else Reward(tiny_causal, RewardObjective(kind=kind))
        config = settings_for(kind, adapter={"kind": "full"}, max_grad_norm=1e9)
        encoded = prepared(objective)
        apply_adapter(objective, config)
        moved(objective.model)
        rest = iter(encoded)
        batches = [[next(rest) for _ in range(size)] for size in sizes]
        row = gradients(objective, batches, config, "float32")
        found = {n: w.grad.clone() for n, w in objective.model.named_parameters() if w.grad is not None}
        both.append((row, found))
    (one, whole), (other, parts) = both
    assert whole and one["reward_margin"] == pytest.approx(other["reward_margin"], rel=1e-4)
    for name, gradient in whole.items():
        # The same sums in another order and padding: float32 rounding only.
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6)


def trained(folder, work, config, crash_after=None):
    torch.manual_seed(config.seed)
    objective = dpo(folder)
    encoded = prepared(objective, 24)
    apply_adapter(objective, config)
    if crash_after is not None:
        original, calls = objective.gradient, iter(range(100))

        def counted(*arguments):
            if next(calls) >= crash_after:
                raise KeyboardInterrupt
            return original(*arguments)

        objective.gradient = counted
    state = fit(objective, encoded[:20], encoded[20:], config, "float32", work, lambda *_: None)
    return checkpoint.copy_weights(objective.model), state


def test_a_resumed_dpo_ends_with_the_very_weights_of_an_uninterrupted_one(tiny_causal, tmp_path):
    config = settings_for("dpo", epochs=2, checkpoint_steps=2, eval_steps=3, learning_rate=1e-3)
    whole, state = trained(tiny_causal, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny_causal, tmp_path / "cut", config, 5)
    resumed, again = trained(tiny_causal, tmp_path / "cut", config)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # What is no clock and no machine's memory.
    drop = ("time", "tokens_per_second", "step_seconds", "memory_gib", "memory_fraction")
    assert [{k: v for k, v in row.items() if k not in drop} for row in again.history] == [
        {k: v for k, v in row.items() if k not in drop} for row in state.history
    ]


def test_a_long_prompt_is_cut_for_both_answers_and_a_long_answer_is_not(tiny_causal):
    objective = dpo(tiny_causal)
    pair = objective.encode({**rows(1)[0], "prompt": "a b c d " * 60})
    short = objective.shorten(pair, 64)
    assert len(short) == 64 and (short.chosen, short.rejected) == (pair.chosen, pair.rejected)
    assert short.prompt[0] == pair.prompt[0] == objective.tokenizer.bos_token_id
    assert short.prompt[1:] == pair.prompt[1 - len(short.prompt) :]
    assert objective.shorten(objective.encode({**rows(1)[0], "rejected": "合同" * 90}), 64) is None
    assert objective.tokens(pair) == 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
    assert causal.token_count(pair.sequences) == len(pair.chosen) + len(pair.rejected)


def test_scores_that_a_margin_needs_are_missed_with_their_line(caplog):
    margin = DpoObjective(kind="dpo", score_weight=0.5)
    scored = rows(2, chosen_score=4.0, rejected_score=1.0)
    with pytest.raises(StageStopped, match=r"3 of 5 examples lack .*pairs\.jsonl:7"):
        pairs.refuse_without_scores([*scored, *rows(3)], margin)
    pairs.refuse_without_scores(scored, margin)
    assert pairs.usable([*scored, *rows(3)], margin) == scored and "3 examples of eval" in caplog.text
    pairs.refuse_without_scores(rows(3), DpoObjective(kind="dpo"))


def test_a_margin_of_ipo_is_refused():
    with pytest.raises(
        ValidationError, match=r"mean nothing to loss ipo, whose own margin is 1 / \(2 beta\)"
    ):
        settings_for({"kind": "dpo", "loss": "ipo", "reward_margin": 1.0})
