"""What lives beside a model while it is trained, by the dry run and by the same code on numbers."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from components.shared import chat, generation, rewards
from components.shared.dryrun import no_weights_read, shapes_only
from components.shared.modelcard import BaseModelRef, ModelCard
from components.train import checkpoint, dry_start, footprint, holding, retention
from components.train.beginning import adapt
from components.train.config import TrainConfig
from components.train.footprint import Beside
from components.train.longest import longest_answers
from components.train.objectives.opening import open_objective
from components.train.update import make_optimizer, step
from tests.live import Counted
from tests.tiny import tiny_gemma

ORIGIN = {"file": "corpus.jsonl", "line": 1, "part": "main"}
WIDTH = 48


def rows(count, **fields):
    return [{"id": f"{i:03}", "origin": ORIGIN, **fields} for i in range(count)]


def answered(count, words=20):
    return rows(count, prompt="rent " * words, completion="paid " * words)


def settings(folder, **changes):
    base = {"base_model": str(folder), "precision": "float32", "max_length": 256, "per_device_batch_size": 2}
    return TrainConfig(**(base | changes))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_tokenizer):
    """A causal model that is wider than the student."""
    folder = tmp_path_factory.mktemp("teacher")
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "sliding_window": 512,
    }
    tiny_gemma(len(tiny_tokenizer), bos_token_id=1, eos_token_id=2, **sizes).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory, tiny_causal):
    """A reward model with its card."""
    folder = tmp_path_factory.mktemp("judge")
    model, tokenizer = rewards.open_model(tiny_causal)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ModelCard(
        task="reward",
        layout="transformers",
        base_model=BaseModelRef(uri="tiny", fingerprint="tiny"),
        max_length_tokens=64,
        template_probe=chat.probe(tokenizer),
        trainable_weights=1,
        total_weights=1,
        mlflow_run="",
    ).write(folder)
    return folder


def living():
    """Bytes of the storages of all real tensors of floating point that the collector knows."""
    gc.collect()
    known = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.is_floating_point():
            storage = found.untyped_storage()
            known[storage.data_ptr()] = storage.nbytes()
    return sum(known.values())


def really_held(config, folder, data, beside):
    """Bytes between updates: the models, what holds them, moments, gradients and the best weights."""
    before = living()
    objective = open_objective(config, data, Path(folder), beside.reward_model, beside.teacher)
    encoded = [objective.encode(row) for row in data]
    objective.prepare(encoded, nullcontext)
    adapt(objective, config)
    objective.start()
    if config.retain:
        found = retention.encode(objective, beside.retained, config)
        holding.hold(objective, found, config, nullcontext)
    optimizer = make_optimizer(objective.model, config)
    for weight in checkpoint.trainable(objective.model).values():
        weight.grad = torch.zeros_like(weight)
    step(optimizer, 1e-4)
    best = checkpoint.copy_weights(objective.model)
    found = living() - before
    del best, encoded
    return found


@pytest.mark.parametrize("name", ["read along", "ppo", "forgetting"])
def test_what_a_dry_run_holds_a_real_one_does(tiny_causal, teacher, judge, name):
    data, beside = answered(4), Beside()
    if name == "read along":
        taught = {"kind": "distillation", "teacher": "t", "keep_states": False}
        config, beside = settings(tiny_causal, objective=taught), Beside(teacher=teacher)
    elif name == "ppo":
        asked = {"kind": "ppo", "reward_model": "r", "max_new_tokens": 4}
        config, beside = settings(tiny_causal, objective=asked, adapter="full"), Beside(reward_model=judge)
        data = rows(4, prompt="rent " * 20)
    else:
        held = {"source": "s", "ewc": 1.0, "distil_from_base": 1.0, "fisher_examples": 2}
        config = settings(tiny_causal, objective="sft", adapter="full", retain=held)
        beside = Beside(retained=answered(4))
    dry = footprint.predict(config, Path(tiny_causal), data, 0, beside).held_bytes
    # Small tables of positions are made where one or the other does not look; the smallest of what is looked
    # for, a copy of the weights, is a tenth of it.
    assert dry == pytest.approx(really_held(config, tiny_causal, data, beside), rel=0.03)


def test_a_dry_run_of_pairs_is_told_the_reference_of_those_that_are_replayed(tiny_causal):
    data = rows(4, prompt="rent", chosen="paid", rejected="due")
    kept = rows(12, prompt="rent " * 9, chosen="paid " * 9, rejected="due " * 9)  # so these are the heaviest
    retain = {"source": "s", "judged_examples": 2, "replay": 0.9, "ewc": 1.0}
    config = settings(tiny_causal, objective="dpo", adapter="full", retain=retain)
    found = footprint.predict(config, Path(tiny_causal), data, 0, Beside(retained=kept))
    assert found.peak_bytes > found.held_bytes > 0


def test_what_qlora_quantises_is_read_whole_first(tiny_causal):
    loaded, held = [], []
    for kind in ("lora", "qlora"):
        config = settings(tiny_causal, objective="dpo", adapter=kind)
        data = rows(4, prompt="rent " * 20, chosen="paid " * 9, rejected="due " * 9)
        found = footprint.predict(config, Path(tiny_causal), data, 0)
        loaded.append(found.load_bytes)
        held.append(found.held_bytes)
    # The scales of a tiny layer lie in a block of 256.
    assert loaded[1] == pytest.approx(loaded[0], rel=0.1) and held[1] < 0.95 * held[0]


def test_a_teachers_states_are_kept_of_every_example_and_its_body_goes(tiny_causal, teacher):
    config = settings(tiny_causal, objective={"kind": "distillation", "teacher": "t"})
    data = answered(4)
    with shapes_only() as live, no_weights_read():
        objective = open_objective(config, data, Path(tiny_causal), teacher_folder=teacher)
        encoded = dry_start.encoded(objective, data, config)
        before = live.bytes
        kept = dry_start.prepared(objective, encoded, encoded[:1], 251.0, nullcontext, live)
        terms = sum(map(objective.terms, encoded))
        # Of 251 times as many examples those that were given are in memory already.
        assert kept == pytest.approx(250 * terms * WIDTH * 4, rel=1e-6)
        # Two layers of four square matrices and three wide ones, at least.
        assert live.bytes < before + terms * WIDTH * 4 - 2 * 4 * (2 * WIDTH * 16 + 3 * WIDTH * 96)
    found = footprint.Footprint(1, 1, 1, 100, 200, kept, 0, footprint.HOST_BYTES, 1, 1.0, 1.0, 1.0)
    assert found.process_bytes == footprint.HOST_BYTES + 200 + kept + round(footprint.SLACK * 100)
    assert found.device_bytes == 200  # they are in the memory of the host


def test_the_longest_answers_take_what_real_ones_take(tiny_causal):
    prompts, size, new = [[5] * 12, [6] * 30, [7] * 25], 3, 40
    peaks = []
    for dry in (True, False):
        with shapes_only() if dry else Counted() as live, no_weights_read() if dry else nullcontext():
            config = settings(tiny_causal, objective="sft")
            model = open_objective(config, answered(2), Path(tiny_causal)).model
            model.set_attn_implementation("eager")
            for weight in model.parameters():
                live.see(weight)
            before = live.peak = live.bytes
            with longest_answers(live) if dry else nullcontext():
                # Nothing ends an answer early.
                found = generation.generate(model, prompts, (), new, size, temperature=1.0)
            assert [len(answer.tokens) for answer in found] == [new] * 3
            peaks.append(live.peak - before)
    # The real one's cache grows by a token at a time, and the old one is there while the new one is made.
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)


def test_a_teacher_that_writes_the_answers_is_asked_for_the_longest(tiny_causal, teacher):
    def peak(tokens):
        taught = {"kind": "distillation", "teacher": "t", "level": "sequence", "max_new_tokens": tokens}
        config = settings(tiny_causal, objective=taught)
        with shapes_only() as live, no_weights_read(), longest_answers(live):
            objective = open_objective(config, answered(1), Path(tiny_causal), teacher_folder=teacher)
            live.mark()
            before = live.bytes
            dry_start.answered(objective, answered(40, 2))
            assert live.bytes < before - 4 * 3 * 2 * WIDTH * 96  # it has said all that it is asked for
            return live.peak - before

    # The cache of 32 answers of 300 tokens: two layers, keys and values, one head of 16 numbers.
    assert peak(300) > 32 * 300 * 2 * 2 * 16 * 4 > peak(4)


def test_two_phases_are_each_counted_and_the_second_holds_what_the_first_moved(tiny_encoder):
    data = [{**row, "label": "ab"[at % 2]} for at, row in enumerate(rows(8, text="profit " * 9))]
    documents = rows(6, text="profit " * 300)
    short = {"per_device_batch_size": 4, "max_length": 64}
    alone = settings(tiny_encoder, objective="classification", **short)
    both = settings(tiny_encoder, objective="classification", first={"source": "s"}, **short)
    one = footprint.predict(alone, Path(tiny_encoder), data, 0)
    two = footprint.predict(both, Path(tiny_encoder), data, 0, Beside(documents=documents))
    assert one.first is None and one.pieces == 1
    # 302 tokens in pieces of 64, each with its own two ends.
    assert two.first.pieces == 5
    assert two.held_bytes - one.held_bytes == pytest.approx(4 * two.first.moving_weights, rel=0.05)
    # All its tokens are predicted at once, longer pieces of them: the first is the larger.
    assert two.first.peak_bytes > two.peak_bytes
    assert two.process_bytes == two.first.process_bytes and two.device_bytes == two.first.peak_bytes


def test_a_copy_without_bytes_is_another_tensor_and_ties_stay_tied():
    with shapes_only() as live:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        model.requires_grad_(False)
        before = live.bytes
        copied = copy.deepcopy(model)
        assert live.bytes == before + 4 * 16
        assert copied[0].weight is copied[1].weight and not copied[0].weight.requires_grad
    assert not hasattr(FakeTensor, "__deepcopy__") or FakeTensor.__deepcopy__ is torch.Tensor.__deepcopy__
