"""The self-check passes what is right and stops each defect that it is there for, with the numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from components.shared import causal, packed
from components.shared.errors import TuneyardError
from components.train import selfcheck
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.objectives import infonce
from components.train.objectives.base import Objective, choose_attention
from components.train.objectives.classification import Classification
from components.train.objectives.config import ContrastiveObjective, MultiTaskObjective
from components.train.objectives.contrastive import Contrastive
from components.train.objectives.multi_task import MultiTask, heads_of
from components.train.objectives.sft import Sft

ROWS = [
    {"prompt": f"question {i} " * (1 + i % 3), "completion": f"合同 {i} " * (1 + i % 4)} for i in range(9)
]


@pytest.fixture(params=["lora", "full"])
def sft(request, tiny_causal):
    torch.manual_seed(0)
    objective = Sft(tiny_causal, "float32")
    choose_attention(objective, 128)
    apply_adapter(objective, TrainConfig(objective="sft", base_model="tiny", adapter=request.param))
    objective.model.train()
    return objective


def check(objective, rows=ROWS, precision="float32"):
    return selfcheck.check(objective, [objective.encode(row) for row in rows], rows, precision)


def test_the_real_loss_passes_and_the_check_leaves_no_trace(sft):
    before = torch.get_rng_state()
    found = check(sft)
    assert set(found) == {
        "micro_batches_loss",
        "micro_batches_gradient",
        "plain_loss",
        "plain_gradient",
    }
    assert max(found.values()) < 1e-4
    assert torch.equal(torch.get_rng_state(), before) and sft.model.training and sft.packs
    assert all(weight.grad is None for weight in sft.model.parameters())


def test_bfloat16_passes_within_its_own_rounding(sft):
    assert 0 < max(check(sft, precision="bfloat16").values()) < 0.1


def test_a_classifier_passes(tiny_encoder):
    objective = Classification(tiny_encoder, ["a", "b"])
    rows = [{"text": "the company said profit rose " * (1 + i % 3), "label": "ab"[i % 2]} for i in range(6)]
    assert set(check(objective, rows)) == {"micro_batches_loss", "micro_batches_gradient"}


PAIRS = [{"anchor": f"profit rose {i} times", "positive": "the rent " * (1 + i % 3)} for i in range(6)]


@pytest.fixture
def contrastive(tiny_encoder):
    return Contrastive(tiny_encoder, ContrastiveObjective(kind="contrastive"))


@pytest.mark.parametrize("temperature", [0.05, 0.01, 0.005])
def test_what_rounding_does_to_a_contrastive_loss_is_allowed_at_every_temperature(tiny_encoder, temperature):
    # Vectors of six pairs that are as alike as those of a trained encoder, with and without three digits.
    random = torch.Generator().manual_seed(0)
    settings = ContrastiveObjective(kind="contrastive", temperature=temperature)
    allowed = Contrastive(tiny_encoder, settings).rounding * selfcheck._LOSS["bfloat16"]
    keys = [torch.arange(6), torch.arange(6, 12), torch.zeros(0)]
    moved = []
    for _ in range(50):
        topics = torch.randn(384, generator=random) + 0.3 * torch.randn(6, 384, generator=random)
        sides = topics + 0.6 * torch.randn(2, 6, 384, generator=random)
        exact = [*torch.nn.functional.normalize(sides, dim=-1), torch.zeros(0, 384)]
        losses = [
            infonce.summed(vectors, keys, temperature, symmetric=False)
            for vectors in (exact, [side.bfloat16() for side in exact])
        ]
        moved.append(selfcheck._relative(*(float(loss) / 6 for loss in reversed(losses))))
    assert allowed / 40 < max(moved) < allowed


def test_a_loss_without_digits_is_no_difference(contrastive, monkeypatch):
    # Pairs an encoder knows: 1 - p in float32 comes in steps of 6e-8, so these are neighbours.
    losses = iter([2 * 2.0**-24, 3 * 2.0**-24])
    gradient = contrastive.gradient
    monkeypatch.setattr(contrastive, "gradient", lambda *args: gradient(*args) and next(losses))
    assert check(contrastive, PAIRS)["micro_batches_loss"] < 1e-4


def test_gradients_that_hang_on_the_whole_update_pass(contrastive, tiny_encoder):
    assert 0 < max(check(contrastive, PAIRS).values()) < 1e-4
    labels = [("a", "x"), ("b", "1"), ("a", "y"), ("b", "2")] * 2
    rows = [{"task": task, "text": f"profit {label}", "label": label} for task, label in labels]
    tasks = {"a": {"head": "classification"}, "b": {"head": "regression"}}
    settings = MultiTaskObjective.model_validate(
        {"kind": "multi-task", "tasks": tasks, "gradients": "pcgrad"}
    )
    several = MultiTask(tiny_encoder, settings, heads_of(rows, settings), 1e-3, 0.0)
    assert 0 < max(check(several, rows).values()) < 1e-3


def test_micro_batches_that_are_negatives_to_themselves_alone_are_stopped(contrastive, monkeypatch):
    monkeypatch.setattr(contrastive, "gradient", partial(Objective.gradient, contrastive))
    with pytest.raises(TuneyardError, match=r"one batch, and of its examples one by one: they differ by \d+"):
        check(contrastive, PAIRS)


def test_a_mean_of_means_is_stopped(sft, monkeypatch):
    real = sft.summed_loss
    monkeypatch.setattr(sft, "summed_loss", lambda batch, s: real(batch, s) / len(batch))
    with pytest.raises(TuneyardError, match=r"one batch, and of its examples one by one: they differ by \d+"):
        check(sft)


def test_a_packed_row_whose_examples_see_each_other_is_stopped(sft, monkeypatch):
    def leaking(*args, cu_seq_lens_q, **named):
        return packed._attention(*args, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **named)

    from transformers import AttentionInterface

    AttentionInterface.register(packed.ATTENTION, leaking)
    try:
        with pytest.raises(TuneyardError, match="padded and masked: they differ by"):
            check(sft)
    finally:
        packed.use(sft.model)


def test_a_prompt_that_carries_loss_is_stopped(sft, monkeypatch):
    def all_of_it(encoded):
        return causal.Encoded(encoded.prompt[:1], encoded.prompt[1:] + encoded.answer)

    real = sft.summed_loss
    monkeypatch.setattr(sft, "summed_loss", lambda batch, s: real([all_of_it(e) for e in batch], s))
    with pytest.raises(TuneyardError, match="padded and masked: they differ by"):
        check(sft)


def test_a_loss_that_is_no_number_is_stopped(sft, monkeypatch):
    real = sft.summed_loss
    monkeypatch.setattr(sft, "summed_loss", lambda batch, s: real(batch, s) * float("nan"))
    with pytest.raises(TuneyardError, match="differ by nan%"):
        check(sft)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.replace("message['content']", "message['content'] | trim"), "where prompt and answer"),
        (lambda t: t + "{% if add_generation_prompt %}Answer: {% endif %}", "have 'Answer: "),
    ],
)
def test_a_template_that_changes_an_answer_is_stopped(sft, change, what):
    sft.tokenizer.chat_template = change(sft.tokenizer.chat_template)
    with pytest.raises(TuneyardError, match=what):
        check(sft)
