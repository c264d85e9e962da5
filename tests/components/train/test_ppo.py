"""PPO: the papers' formulas written out, a task whose reward is known, resume, the base as the anchor."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from components.shared import chat, generation
from components.train import checkpoint, selfcheck
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives import advantages
from components.train.objectives.advantages import Rollout
from components.train.objectives.base import choose_attention
from components.train.objectives.config import PpoObjective
from components.train.objectives.ppo import Ppo

ORIGIN = {"file": "prompts.jsonl", "line": 3, "part": "main"}


def rows(count):
    return [{"id": str(i), "origin": ORIGIN, "prompt": f"question {i} " * (1 + i % 3)} for i in range(count)]


def settings_for(objective=None, **changes):
    base = {"base_model": "tiny", "max_length": 96, "precision": "float32", "per_device_batch_size": 8}
    base["objective"] = {"kind": "ppo", "reward_model": "r", "max_new_tokens": 8, **(objective or {})}
    return TrainConfig(**(base | changes))


def share_of(letters):
    """A judge whose reward is known: four times the share of an answer's characters that are these."""

    def judge(asked, answers, ended):
        assert len(asked) == len(answers) == len(ended)
        return [4 * sum(map(answer.count, letters)) / max(1, len(answer)) for answer in answers]

    return judge


def ppo(folder, config, judge=None):
    torch.manual_seed(config.seed)
    inside = config.adapter.base_inside
    objective = Ppo(folder, "float32", config.objective, judge or share_of("abcdefghijklmnopqrst"), inside)
    choose_attention(objective, config.max_length)
    objective.prepare([], nullcontext)
    apply_adapter(objective, config)
    objective.start()
    return objective


def plain_advantages(rewards, values, gamma, lam):
    """A_t as the sum of equation 16: every later surprise, discounted."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_discounted_surprises(gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    found = advantages.advantages(rewards, values, gamma, lam)
    assert found.tolist() == pytest.approx(plain_advantages(rewards.tolist(), values.tolist(), gamma, lam))


def test_the_reward_comes_last_and_distance_costs_at_each_token():
    now, before = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    found = advantages.token_rewards(3.0, now, before, 0.1)
    assert found.tolist() == pytest.approx([-0.05, 0.1, 3.0])


def test_whitened_advantages_have_mean_nothing_and_deviation_one():
    parts = [torch.tensor([1.0, 5.0]), torch.tensor([9.0])]
    every = torch.cat(advantages.whitened(parts))
    assert float(every.mean()) == pytest.approx(0, abs=1e-6)
    assert float(every.std(unbiased=False)) == pytest.approx(1)
    assert every.tolist() == sorted(every.tolist())


def plain_losses(log_probs, values, rollout, settings):
    """Equations 7 and 9, a token at a time, in Python's float64."""
    policy, value = 0.0, 0.0
    for at, (new, expected) in enumerate(zip(log_probs, values, strict=True)):
        ratio = math.exp(new - float(rollout.log_probs[at]))
        advantage, target = float(rollout.advantages[at]), float(rollout.returns[at])
        bounded = min(max(ratio, 1 - settings.clip), 1 + settings.clip)
        policy -= min(ratio * advantage, bounded * advantage)
        old = float(rollout.values[at])
        near = old + min(max(expected - old, -settings.value_clip), settings.value_clip)
        value += 0.5 * max((expected - target) ** 2, (near - target) ** 2)
    return policy, value


def test_an_updates_losses_are_those_of_the_paper(tiny_causal):
    config = settings_for({"clip": 0.1, "value_clip": 0.05, "value_weight": 0.3}, adapter={"kind": "full"})
    objective = ppo(tiny_causal, config)
    said = objective._rollouts([objective.encode(row) for row in rows(5)], nullcontext)
    with torch.no_grad():  # a model some updates later, so that ratios are outside their clip
        for weight in objective.model.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    policy = value = 0.0
    for each in said:
        ids = torch.tensor([[*each.prompt, *each.answer]])
        objective.model.set_attn_implementation("eager")
        with torch.no_grad():
            hidden = objective.model.model(input_ids=ids)[0][0]
            at = slice(len(each.prompt) - 1, len(each) - 1)
            logits = objective.model.lm_head(hidden[at]).double().log_softmax(-1)
            values = objective.model.value_head(hidden[at])[:, 0].tolist()
        log_probs = [float(logits[i, token]) for i, token in enumerate(each.answer)]
        one, other = plain_losses(log_probs, values, each, config.objective)
        policy, value = policy + one, value + other
    choose_attention(objective, config.max_length)
    ours = float(objective.summed_loss(said, 0.0).detach())
    # float32 log-probabilities against float64 ones.
    assert ours == pytest.approx(policy + 0.3 * value, rel=1e-3, abs=1e-3)
    assert objective._sums["policy_loss"] == pytest.approx(policy, rel=1e-3, abs=1e-3)
    assert 0 < objective._sums["clipped_fraction"] < sum(len(each.answer) for each in said)


def test_the_old_log_probabilities_are_those_of_the_drawn_tokens_and_the_base_is_the_anchor(tiny_causal):
    config = settings_for({"kl_weight": 0.5})
    objective = ppo(tiny_causal, config, lambda asked, answers, ended: [0.0] * len(answers))
    prompts = [objective.encode(row) for row in rows(4)]
    objective._rollouts(prompts, nullcontext)
    assert objective.notes()["kl_nats"] == pytest.approx(0, abs=1e-4)  # LoRA begins at the base
    with torch.no_grad():
        for name, weight in objective.model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    said = objective._rollouts(prompts, nullcontext)
    objective.model.set_attn_implementation("eager")
    apart = 0.0
    for each in said:
        ids = torch.tensor([[*each.prompt, *each.answer]])
        with torch.no_grad():
            now = objective.model(input_ids=ids).logits[0].log_softmax(-1)
            with objective.model.disable_adapter():
                before = objective.model(input_ids=ids).logits[0].log_softmax(-1)
        at = range(len(each.prompt) - 1, len(each) - 1)
        chosen = [now[i, token] for i, token in zip(at, each.answer, strict=True)]
        torch.testing.assert_close(torch.stack(chosen), each.log_probs, rtol=1e-4, atol=1e-4)
        apart += sum(float(n - before[i, token]) for n, i, token in zip(chosen, at, each.answer, strict=True))
    assert objective.notes()["kl_nats"] == pytest.approx(apart / 4, rel=1e-3) and abs(apart) > 0.01


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reward_that_is_known_rises_and_the_value_head_does_not_ship(tiny_causal, tmp_path, kind):
    config = settings_for(
        {"kl_weight": 0.01, "rollout_epochs": 3, "max_new_tokens": 5},
        adapter={"kind": kind},
        max_steps=12,
        learning_rate=3e-2 if kind == "lora" else 5e-3,
        warmup_fraction=0.0,
        eval_steps=4,
        per_device_batch_size=12,
    )
    objective = ppo(tiny_causal, config)
    prompts = [objective.encode(row) for row in rows(18)]
    state = fit(objective, prompts[:12], prompts[12:], config, "float32", tmp_path, lambda *_: None)
    rewards, last = [row["reward"] for row in state.history], state.history[-1]
    assert sum(rewards[-4:]) > sum(rewards[:4])
    assert state.best_loss < state.base_loss - 0.5  # greedy answers, to prompts that it was not trained on
    assert last["kl_nats"] > 0 and {"eval_reward", "eval_kl_nats"} <= last.keys()
    assert 0 <= last["clipped_fraction"] <= 1
    names = [name for name, _ in objective.model.named_parameters()]
    assert any("value_head" in name for name in names)
    objective.finish()
    assert not any("value_head" in name for name, _ in objective.model.named_parameters())


def trained(folder, work, config, crash_after=None):
    objective = ppo(folder, config)
    prompts = [objective.encode(row) for row in rows(20)]
    if crash_after is not None:
        original, calls = objective.gradient, iter(range(1000))

        def counted(*arguments):
            if next(calls) >= crash_after:
                raise SystemExit
            return original(*arguments)

        objective.gradient = counted
    state = fit(objective, prompts[:16], prompts[16:], config, "float32", work, lambda *_: None)
    return checkpoint.copy_weights(objective.model), state


def test_a_run_killed_in_the_middle_of_a_step_resumes_to_the_very_weights(tiny_causal, tmp_path):
    config = settings_for(
        {"rollout_epochs": 2, "minibatches": 2},
        max_steps=6,
        checkpoint_steps=2,
        eval_steps=3,
        learning_rate=5e-3,
    )
    whole, state = trained(tiny_causal, tmp_path / "whole", config)
    with pytest.raises(SystemExit):
        trained(tiny_causal, tmp_path / "cut", config, 3 * 4 + 2)  # in the fourth step, after two updates
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["step-2"]
    resumed, again = trained(tiny_causal, tmp_path / "cut", config)
    assert whole and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row["reward"] for row in again.history] == [row["reward"] for row in state.history]


def test_a_step_goes_over_its_answers_as_often_as_asked(tiny_causal):
    config = settings_for({"rollout_epochs": 3, "minibatches": 2})
    objective = ppo(tiny_causal, config)
    prompts = [objective.encode(row) for row in rows(6)]
    turns = list(objective.turns([prompts[:3], prompts[3:]], nullcontext))
    assert len(turns) == 3 * 2 and all(len(micro) <= 3 for turn in turns for micro in turn)
    for epoch in range(3):
        seen = [each for turn in turns[2 * epoch : 2 * epoch + 2] for micro in turn for each in micro]
        assert sorted(map(id, seen)) == sorted({id(each) for each in seen}) and len(seen) == 6
        assert sorted(tuple(each.prompt) for each in seen) == sorted(
            tuple(prompt.prompt) for prompt in prompts
        )


def test_an_answer_that_was_cut_earns_less(tiny_causal):
    earned = []
    for penalty in (0.0, 2.5):
        config = settings_for({"missing_end_penalty": penalty, "max_new_tokens": 1, "kl_weight": 0.0})
        objective = ppo(tiny_causal, config, lambda asked, answers, ended: [1.0] * len(answers))
        said = objective._rollouts([objective.encode(row) for row in rows(8)], nullcontext)
        ends = chat.end_ids(objective.tokenizer)
        assert any(each.answer[-1] not in ends for each in said)
        earned.append({tuple(each.answer): float(each.returns[-1]) for each in said})
    for answer, reward in earned[1].items():
        assert reward == pytest.approx(1.0 if answer[-1] in ends else -1.5)
    assert set(earned[0].values()) == {1.0}


def test_the_self_check_passes_on_answers(tiny_causal):
    config = settings_for()
    objective = ppo(tiny_causal, config)
    before = torch.get_rng_state()
    found = selfcheck.check(objective, [objective.encode(row) for row in rows(8)], rows(8), "float32")
    assert set(found) == {"micro_batches_loss", "micro_batches_gradient"}
    assert torch.equal(before, torch.get_rng_state())


def test_the_self_check_is_not_left_with_a_gradient_that_sums_to_nothing(tiny_causal):
    objective = ppo(tiny_causal, settings_for())
    tries = [objective.rehearsed([objective.encode(row) for row in rows(6)]) for _ in range(2)]
    assert len({tuple(tuple(each.answer) for each in found) for found in tries}) == 1


def test_drawn_tokens_have_the_frequencies_of_the_softmax(tiny_causal):
    config = settings_for()
    objective = ppo(tiny_causal, config)
    objective.model.set_attn_implementation("eager")
    prompt = objective.encode(rows(1)[0]).prompt
    torch.manual_seed(3)
    answers = generation.generate(objective.model, [prompt] * 2000, {0}, 1, 500, temperature=1.0)
    with torch.no_grad():
        expected = objective.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([a.chosen[0] for a in answers]), minlength=len(expected)).double()
    # Total variation of 2000 draws over 300 tokens from their own distribution is about
    # sum sqrt(p (1 - p) / (2 pi n)) < sqrt(300 / (2 pi 2000)) = 0.155.
    assert float((counts / 2000 - expected).abs().sum() / 2) < 0.2
    likeliest = generation.generate(objective.model, [prompt], {0}, 1, 1)[0].chosen[0]
    assert likeliest == int(expected.argmax())


def test_a_rollouts_length_is_what_the_model_reads():
    none = torch.zeros(2)
    assert len(Rollout([1, 2, 3], [4, 5], none, none, none, none)) == 5
    assert PpoObjective(kind="ppo", reward_model="s3://a/b").external_uris() == ["s3://a/b"]
    assert settings_for().external_uris() == ["tiny", "r"]
