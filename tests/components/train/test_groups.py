"""GRPO and RLOO: TRL's losses, the papers' advantages, rules, a task whose reward is known, resume."""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from components.shared.causal import Encoded
from components.shared.errors import TuneyardError
from components.train import checkpoint, selfcheck
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives import groups
from components.train.objectives.base import choose_attention
from components.train.objectives.group_config import AnswerReward, FormatReward
from components.train.objectives.groups import Drawn, Grpo, Rloo
from components.train.objectives.opening import open_objective
from tests.trl_source import method

ORIGIN = {"file": "prompts.jsonl", "line": 3, "part": "main"}
KINDS = {"grpo": Grpo, "rloo": Rloo}


def rows(count):
    return [{"id": str(i), "origin": ORIGIN, "prompt": f"question {i} " * (1 + i % 3)} for i in range(count)]


def settings_for(kind="grpo", objective=None, **changes):
    base = {"base_model": "tiny", "max_length": 96, "precision": "float32", "per_device_batch_size": 4}
    base["objective"] = {
        "kind": kind,
        "reward_model": "r",
        "max_new_tokens": 6,
        "group_size": 4,
        **(objective or {}),
    }
    return TrainConfig(**(base | changes))


def share_of(letters):
    """A judge whose reward is known: four times the share of an answer's characters that are these."""

    def judge(asked, answers, ended):
        assert len(asked) == len(answers) == len(ended)
        return [4 * sum(map(answer.count, letters)) / max(1, len(answer)) for answer in answers]

    return judge


LETTERS = "abcdefghijklmnopqrst"


def opened(folder, config, judge=None):
    torch.manual_seed(config.seed)
    inside = config.adapter.base_inside
    kind = KINDS[config.objective.kind]
    objective = kind(folder, "float32", config.objective, judge or share_of(LETTERS), inside)
    choose_attention(objective, config.max_length)
    objective.prepare([], nullcontext)
    apply_adapter(objective, config)
    objective.start()
    return objective


def test_an_advantage_is_a_reward_above_its_group():
    rewards = [1.0, 2.0, 6.0, 0.0, 0.0, 0.0]
    plain = groups.relative(rewards, 3, scale=False)
    assert plain == pytest.approx([-2, -1, 3, 0, 0, 0])
    deviation = math.sqrt((4 + 1 + 9) / 2)  # of a sample, as TRL's
    scaled = groups.relative(rewards, 3, scale=True)
    assert scaled == pytest.approx([x / (deviation + 1e-4) for x in (-2, -1, 3)] + [0, 0, 0])
    # Each against the mean of the other two.
    assert groups.left_out(rewards, 3) == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])


def answers(lengths):
    """Answers as if drawn some updates ago, by turns better and worse than their group."""
    torch.manual_seed(0)
    return [
        Drawn([1, 2], [3] * n, -torch.rand(n) - 0.5, -torch.rand(n) - 0.5, (-1) ** i * (0.5 + i))
        for i, n in enumerate(lengths)
    ]


def padded(parts):
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def trl_loss(kind, now, drawn, clip, kl_weight, loss_type):
    """What TRL's trainer computes from the same probabilities, by its own source."""
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x)
    same.num_processes = 1
    masks = padded([torch.ones(len(part)) for part in now])
    everything = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (padded(now), torch.zeros_like(masks), None),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
        "accelerator": same,
        "epsilon_low": clip,
        "epsilon_high": clip,
        "beta": kl_weight,
        "loss_type": loss_type,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "current_gradient_accumulation_steps": 1,
    }
    trainer = SimpleNamespace(**everything)
    inputs = {
        "prompt_ids": torch.ones(len(now), 2),
        "prompt_mask": torch.ones(len(now), 2),
        "completion_ids": masks,
        "completion_mask": masks,
        "advantages": torch.tensor([each.advantage for each in drawn]),
        "old_per_token_logps": padded([each.log_probs for each in drawn]),
        "old_logps": torch.stack([each.log_probs.sum() for each in drawn]),
        "ref_per_token_logps": padded([each.base_log_probs for each in drawn]),
        "num_items_in_batch": masks.sum(),
    }
    nothing = {"nanmin": torch.min, "nanmax": torch.max, "torch": torch}
    return method(f"trainer/{kind}_trainer.py", "_compute_loss", nothing)(trainer, None, inputs)


@pytest.mark.parametrize(
    ("kind", "objective", "loss_type"),
    [
        ("grpo", {"kl_weight": 0.3, "loss": "tokens"}, "dapo"),
        ("grpo", {"kl_weight": 0.3, "loss": "answers"}, "grpo"),
        ("grpo", {"kl_weight": 0.0, "clip": 0.05}, "dapo"),
        ("rloo", {"clip": 0.5}, ""),
    ],
)
def test_an_updates_loss_and_its_slope_are_trls(tiny_causal, kind, objective, loss_type):
    config = settings_for(kind, objective)
    ours = opened(tiny_causal, config)
    drawn = answers([3, 7, 1, 5])
    now = [(each.log_probs + 0.2 * torch.randn(len(each.answer))).requires_grad_() for each in drawn]
    ours._log_probs = lambda sequences, model=None: now
    mine = ours._learned_loss(drawn) / sum(map(ours.terms, drawn))
    theirs = trl_loss(kind, now, drawn, config.objective.clip, config.objective.kl_weight, loss_type)
    # The same arithmetic in another order, in float32.
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for one, other in zip(torch.autograd.grad(mine, now), torch.autograd.grad(theirs, now), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    assert 0 < ours._sums["clipped_fraction"] < sum(map(ours.terms, drawn))


def test_answers_of_a_group_are_drawn_together_and_measured_against_the_base(tiny_causal):
    objective = opened(
        tiny_causal, settings_for("rloo", {"kl_weight": 0.5}), lambda asked, *_: [1.0] * len(asked)
    )
    with torch.no_grad():
        for name, weight in objective.model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    prompts = [objective.encode(row) for row in rows(2)]
    said = objective._rollouts(prompts, nullcontext)
    assert [each.prompt for each in said] == [p.prompt for p in prompts for _ in range(4)]
    assert len({tuple(each.answer) for each in said}) > 2
    assert objective.notes()["even_groups"] == 1.0  # they all earned 1
    apart = [float((each.log_probs - each.base_log_probs).sum()) for each in said]
    assert objective.notes()["kl_nats"] == pytest.approx(sum(apart) / 8) and max(map(abs, apart)) > 0.01
    # What is left to tell them apart is how far they are from the base.
    assert [each.advantage for each in said] == pytest.approx(
        groups.left_out([1 - 0.5 * x for x in apart], 4)
    )
    each = said[0]
    objective.model.set_attn_implementation("eager")
    ids = torch.tensor([[*each.prompt, *each.answer]])
    with torch.no_grad(), objective.model.disable_adapter():
        logits = objective.model(input_ids=ids).logits[0, len(each.prompt) - 1 : -1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(each.answer)[:, None])[:, 0]
    torch.testing.assert_close(each.base_log_probs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "qlora", "ia3", "prompt", "prefix"])
def test_the_base_is_the_model_itself_with_its_adapter_off(tiny_causal, tmp_path, adapter):
    config = settings_for("grpo", {"rewards": [{"kind": "answer"}]}, adapter=adapter)
    objective = open_objective(config, [], tiny_causal)
    prompts = [objective.encode({**row, "completion": "x"}) for row in rows(2)]
    sequences = [Encoded(each.prompt, [5, 6, 7]) for each in prompts]
    with torch.no_grad():
        expected = torch.cat(objective._log_probs(sequences))  # before there is an adapter
        objective.prepare(prompts, nullcontext)
        apply_adapter(objective, config)
        for weight in checkpoint.trainable(objective.model).values():
            weight.add_(0.5 * torch.randn_like(weight))
        found = torch.cat(objective._base_log_probs(sequences))
        now = torch.cat(objective._log_probs(sequences))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(now, expected, rtol=1e-3, atol=1e-3)
    assert objective._base is None  # a second model would be held for nothing


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_is_known_rises(tiny_causal, tmp_path, kind):
    config = settings_for(
        kind,
        {"kl_weight": 0.01, "max_new_tokens": 5, "group_size": 6, "rollout_epochs": 2},
        max_steps=8,
        learning_rate=3e-2,
        warmup_fraction=0.0,
        eval_steps=4,
        early_stopping=None,
        per_device_batch_size=6,
    )
    objective = opened(tiny_causal, config)
    prompts = [objective.encode(row) for row in rows(10)]
    state = fit(objective, prompts[:6], prompts[6:], config, "float32", tmp_path, lambda *_: None)
    rewards = [row["reward"] for row in state.history]
    assert sum(rewards[-3:]) > sum(rewards[:3]) and state.best_loss < state.base_loss
    last = state.history[-1]
    assert last["kl_nats"] > 0 and {"eval_reward", "even_groups", "policy_loss"} <= last.keys()


def test_a_killed_run_ends_with_the_same_bits(tiny_causal, tmp_path):
    config = settings_for(
        "grpo", {"minibatches": 2}, max_steps=4, checkpoint_steps=2, eval_steps=2, learning_rate=5e-3
    )

    def trained(work, crash_after=None):
        objective = opened(tiny_causal, config)
        original, calls = objective.gradient, iter(range(1000))

        def counted(*arguments):
            if crash_after is not None and next(calls) >= crash_after:
                raise SystemExit
            return original(*arguments)

        objective.gradient = counted
        prompts = [objective.encode(row) for row in rows(10)]
        fit(objective, prompts[:8], prompts[8:], config, "float32", work, lambda *_: None)
        return checkpoint.copy_weights(objective.model)

    whole = trained(tmp_path / "whole")
    with pytest.raises(SystemExit):
        trained(tmp_path / "cut", 2 * 2 + 1)  # in the third step, after one of its two updates
    resumed = trained(tmp_path / "cut")
    assert whole and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_check_passes_on_answers(tiny_causal, kind):
    objective = opened(tiny_causal, settings_for(kind))
    before = torch.get_rng_state()
    found = selfcheck.check(objective, [objective.encode(row) for row in rows(6)], rows(6), "float32")
    assert set(found) == {"micro_batches_loss", "micro_batches_gradient"}
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_self_check_is_not_left_with_a_gradient_that_sums_to_nothing(tiny_causal, kind):
    # In expectation that of drawn answers does, and in bfloat16 Gemma's was then off by up to 36%.
    objective = opened(tiny_causal, settings_for(kind))
    tries = [objective.rehearsed([objective.encode(row) for row in rows(3)]) for _ in range(2)]
    answers = [[each.answer for each in found] for found in tries]
    assert answers[0] == answers[1] and all(
        len(set(map(tuple, answers[0][i : i + 4]))) == 1 for i in (0, 4, 8)
    )


def test_rules_earn_what_they_say():
    last = groups.rule_of(AnswerReward(kind="answer", pattern=r"answer: (\d+)", weight=2.0))
    assert last("answer: 3, no, answer: 12", "so the answer: 12") == 2.0
    assert last("answer: 12, no, answer: 3", "answer: 12") == 0.0
    assert last("twelve", "answer: 12") == 0.0 and last("twelve", "twelve") == 0.0
    whole = groups.rule_of(AnswerReward(kind="answer"))
    assert whole(" 三年 ", "三年") == 1.0 and whole("三年。", "三年") == 0.0
    form = groups.rule_of(FormatReward(kind="format", pattern="<a>.*</a>", weight=0.5))
    assert form("<a>1\n2</a>", None) == 0.5 and form("x <a>1</a>", None) == 0.0


def test_rules_are_added_to_the_reward_model_and_need_the_datas_answer(tiny_causal):
    rules = [{"kind": "answer"}, {"kind": "format", "pattern": "[a-z]+", "weight": 0.5}]
    config = settings_for("grpo", {"rewards": rules, "missing_end_penalty": 1.0})
    objective = opened(tiny_causal, config, lambda asked, *_: [10.0] * len(asked))
    known = [objective.encode({**row, "completion": "rent"}) for row in rows(3)]
    assert objective._rewards_of(known, ["rent", "rents", "RENT"], [True] * 3) == [11.5, 10.5, 10.0]
    assert objective.shorten(known[2], 20).reference == "rent"
    with pytest.raises(TuneyardError, match=r"ingest\.format: prompt-completion"):
        objective._rewards_of([objective.encode(rows(1)[0])], ["rent"], [True])
    said = SimpleNamespace(rewards=[2.0, 2.0], ended=[True, False])
    assert objective._earned(said) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("objective", "changes", "expected"),
    [
        ({"reward_model": None}, {}, "nothing judges the answers"),
        ({"rewards": [{"kind": "format", "pattern": "("}]}, {}, "is no regular expression"),
        ({"group_size": 1}, {}, "greater than or equal to 2"),
        ({}, {"learning_rate": "auto"}, "of answers that are yet to be drawn"),
        ({}, {"label_smoothing": 0.1}, "means nothing to grpo"),
    ],
)
def test_settings_that_cannot_be_are_refused(objective, changes, expected):
    with pytest.raises(ValidationError, match=expected):
        settings_for("grpo", objective, **changes)
    assert settings_for("rloo").external_uris() == ["tiny", "r"]
