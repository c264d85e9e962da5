"""Sizing by arithmetic, what is suggested, and a submit that refuses what will not fit."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from components.shared import jsonl
from components.shared.errors import UsageError
from components.shared.stage import Artifact, Context
from components.split.split import split
from components.train.config import TrainConfig
from pipelines import advise, bases, corpus, duration, fits, footprints, sizing, smaller, storage
from pipelines.spec import load


def settings(**changes):
    return TrainConfig(objective="sft", base_model="base", **changes)


def test_steps_and_flop_follow_the_settings():
    config = settings(
        adapter="lora", epochs=2.0, per_device_batch_size=4, gradient_accumulation_steps=2, eval_steps=100
    )
    found = sizing.work(config, 100, 50.0, 0.5, body_weights=1000, vocabulary_weights=400)
    assert found.steps == 25
    assert found.tokens == 2 * 100 * 50
    # LoRA: 4 FLOP a weight and token; the projection at half of them. Two evaluations, forward alone.
    assert found.flop == 1200 * (4 * 10_000 + 2 * 2 * 64 * 50)
    full = sizing.work(
        config.model_copy(update={"adapter": settings(adapter="full").adapter}), 100, 50, 0.5, 1000, 400
    )
    assert full.flop == 1200 * (6 * 10_000 + 2 * 2 * 64 * 50)


@pytest.mark.parametrize(
    ("steps", "every", "times"),
    [(25, 100, 2), (100, 100, 2), (101, 100, 3), (40, None, 11), (41, None, 10), (3, None, 4)],
)
def test_eval_is_judged_before_between_and_after(steps, every, times):
    # As fit does it: after each `every` updates and the last; None: a tenth of the run, rounded up.
    assert sizing.evaluations(settings(eval_steps=every), steps) == times


def test_checkpoints_count_weights_and_not_billions_of_them():
    # Weights, two moments and the best, in float32: 16 bytes for each that moves.
    assert sizing.checkpoint_bytes(10**9, 4) == 64 * 10**9


def test_what_a_run_leaves_is_what_its_stages_write(tmp_path):
    """The sizes are those of a real run of classify_finance (docs/figures.md), object by object."""
    spec = load("classify_finance")
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 711_396)
    needs = SimpleNamespace(total_weights=22_716_296, moving_weights=22_716_296)
    # Rows of 1,389.8 bytes as ingest writes them.
    rows = [{"text": "x" * (1_390 - 12)}]
    left = storage.left_bytes(spec, needs, tmp_path, 90_868_376, rows, 7_674, 2_189 / 7_674)
    measured = {"ingest": 10_665_233, "split": 10_665_233, "evaluate": 2_165_000, "compress": 23_133_000}
    for stage, count in measured.items():
        assert left[stage] == pytest.approx(count, rel=0.05), stage
    assert sum(left.values()) == pytest.approx(138_621_492, rel=0.02)


@pytest.mark.parametrize(
    ("examples", "weights", "changes", "said"),
    [
        (50, 50e6, {"adapter": "full"}, "fewer than 100"),
        (500, 50e6, {"adapter": "full"}, "below 1,000 lora"),
        (5000, 200e6, {"adapter": "full", "learning_rate": 1e-3}, "small learning rate"),
        (50_000, 200e6, {"adapter": "lora"}, "full fine-tuning usually reaches more"),
        (200_000, 200e6, {"adapter": "full"}, "progressive unfreezing"),
        (50_000, 7e9, {"adapter": "full"}, "above one billion"),
        (5000, 50e6, {"adapter": "lora"}, "below 100 million"),
        (500, 7e9, {"adapter": "lora"}, "suit a base of fewer than 100 million"),
    ],
)
def test_what_suits_is_remarked(examples, weights, changes, said):
    assert any(said in remark for remark in sizing.remarks(settings(**changes), examples, int(weights)))


@pytest.mark.parametrize(
    ("kind", "offload", "expected"),
    [
        # 8 billion weights that all move, in float32: 32 GB, gradients as much, moments 64, activations 5.
        ("zero1", "none", 32 + 32 + (64 + 32) / 4 + 5),
        ("zero2", "none", 32 + (32 + 64 + 32) / 4 + 5),
        ("zero2", "cpu", 32 + 5),
        # Weights and gradients of 2 of 32 layers with 7 billion in all, and of the billion outside them.
        ("zero3", "none", (32 + 32 + 64 + 32) / 4 + 8 * (1 + 7 / 16) + 5),
        ("fsdp2", "none", (32 + 32 + 64) / 4 + 8 * (1 + 7 / 16) + 5),
        ("fsdp2", "cpu", 8 * (1 + 7 / 16) + 5),
    ],
)
def test_what_lies_in_pieces_is_divided_by_the_processes(kind, offload, expected):
    held = 32 + 64 + 32  # with the copy of the best weights, which is in the memory of the host
    found = sizing.bytes_in_pieces(
        kind, offload, 4, (8 * 10**9, 8 * 10**9, 7 * 10**9), held * 10**9, (held + 32 + 5) * 10**9, 32
    )
    assert found == pytest.approx(expected * 1e9)


def test_what_is_usual_draws_no_remark():
    assert sizing.remarks(settings(adapter="lora"), 5000, 270_000_000) == []


def test_every_alternative_leaves_the_update_as_large():
    config = settings(adapter="full", per_device_batch_size=8, gradient_accumulation_steps=3)
    ways = [(said, other) for way in smaller.alternatives(config) for said, other in way]
    assert {"train.gradient_checkpointing=true", "train.adapter=lora", "train.adapter=qlora"} <= {
        w for w, _ in ways
    }
    assert {o.per_device_batch_size * o.gradient_accumulation_steps for _, o in ways} == {24}
    assert min(o.per_device_batch_size for _, o in ways) == 1


def test_an_unknown_gpu_is_named():
    with pytest.raises(UsageError, match="--gpu tpu"):
        sizing.gpu("tpu")


def test_a_small_training_needs_no_dry_run_and_a_large_one_does():
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 30522}
    assert sizing.surely_fits(settings(), shape, 90 * 2**20, 16 * 2**30)
    assert not sizing.surely_fits(settings(), shape, 90 * 2**20, 3 * 2**30)
    assert not sizing.surely_fits(settings(), shape, 14 * 2**30, 16 * 2**30)
    assert not sizing.surely_fits(settings(), {"model_type": "whisper"}, 1, 2**60)


@pytest.fixture
def pipeline(tiny_causal, tmp_path, monkeypatch):
    """A pipeline on local files, which asks no store."""
    monkeypatch.setenv("TUNEYARD_STORE", "s3://none/none")
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    monkeypatch.setattr(advise.pace, "newest", lambda configs, *_: [None] * len(configs))  # asks the store
    rows = [{"prompt": f"rent {i} " * 30, "completion": "paid " * 30} for i in range(40)]
    jsonl.write(tmp_path / "corpus.jsonl", rows)
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"name: tiny\ningest: {{source: {tmp_path / 'corpus.jsonl'}}}\n"
        f"train: {{objective: sft, base_model: {tiny_causal}, per_device_batch_size: 16, max_length: 512,\n"
        "        epochs: 2, adapter: full, precision: float32}\n"
    )
    return load(str(path))


# The dry run in a process of its own imports PyTorch and runs it nine times: ten seconds of CPU.
@pytest.mark.slow
def test_submit_refuses_what_will_not_fit_and_says_what_would(pipeline, monkeypatch):
    from components.shared.store import Store

    store = Store.from_environment()
    # What the tiny model needs is mostly the process itself: 20 MiB above it are too few for 16 examples.
    from components.train import footprint

    monkeypatch.setattr(fits, "available_memory_gib", lambda: (footprint.HOST_BYTES + 20 * 2**20) / 2**30)
    with pytest.raises(UsageError, match=r"train will need .* GiB of memory.*nothing has started") as refused:
        fits.refuse_unfit(pipeline, store)
    assert "train.gradient_checkpointing=true" in refused.value.todo
    assert refused.value.exit_code == 2
    monkeypatch.setattr(fits, "available_memory_gib", lambda: 2.0)
    fits.refuse_unfit(pipeline, store)


@pytest.mark.slow  # imports PyTorch's compiler and dry-runs a model: five seconds
def test_advice_counts_the_corpus_and_can_be_printed(pipeline):
    from components.shared.store import Store

    said = advise.advise(pipeline, Store.from_environment(), dollars_per_hour=2.0, gpu="4090")
    assert json.loads(json.dumps(said)) == said
    assert said["run"]["examples"] == 28
    assert said["run"]["steps"] == 4
    assert said["memory"]["fits"]
    assert said["settings_that_fit"] == []
    assert said["remarks"]


def searching(**changes):
    space = {
        "learning_rate": {"low": 1e-5, "high": 1e-3},
        "per_device_batch_size": [4, 16],
        "adapter.rank": [2, 8],
    }
    return settings(search={"space": space, "trials": 6, "parallel": 3}, **changes)


def timed(config):
    sizes = {"tokens_per_example": 50.0, "loss_share": 0.5, "body_weights": 1000, "total_weights": 1400}
    needs = SimpleNamespace(**sizes, pieces=1.0, first=None)
    return duration.run(duration.parts_of(config, needs, 160, 0), [None], "h100", 2.0)


def test_a_search_counts_the_steps_of_all_its_trials_and_the_largest_of_each():
    found = timed(searching(epochs=1.0))
    # Batches of 4 make the most steps: 40 in each of six trials.
    assert found["trials"] == 6 and found["steps"] == 6 * 40 and found["tokens"] == 6 * 160 * 50
    alone = timed(settings(epochs=1.0, per_device_batch_size=4))
    assert "trials" not in alone and alone["steps"] == 40


def test_trials_at_a_time_share_the_memory_each_at_its_largest():
    config = searching()
    heaviest = sizing.heaviest(config)
    assert (heaviest.per_device_batch_size, heaviest.adapter.rank, heaviest.search) == (16, 8, None)
    assert sizing.at_once(config) == 3 and sizing.heaviest(settings()) == settings()
    gib = 2**30
    assert smaller.fewer(4 * gib, 3, 9.0) == [{"set": "train.search.parallel=2", "peak_gib": 8.0}]
    assert smaller.fewer(4 * gib, 3, 3.0) == [] == smaller.fewer(4 * gib, 1, 3.0)
    ways = [
        {"set": "train.per_device_batch_size=4", "peak_gib": 1},
        {"set": "train.adapter=qlora", "peak_gib": 1},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smaller, "fitting", lambda *_: ways)
        said = smaller.in_turn(config, None, 3.0, lambda needs: 0)
    # What the search varies is not for the file to set.
    assert [way["set"] for way in said] == ["train.adapter=qlora train.search.parallel=1"]


def test_a_later_stage_that_does_not_fit_is_refused_with_what_would(pipeline):
    gib = 2**30
    ways = iter(
        [("evaluate.per_device_batch_size=16", 5 * gib), ("evaluate.per_device_batch_size=8", 3 * gib)]
    )
    peaks, limits = {"evaluate": 6 * gib, "compress": 5 * gib}, {"evaluate": 4.0, "compress": 4.0}
    found = footprints.unfit(pipeline, peaks, limits, ways)
    said = {
        "memory": {"fits": True, "limit_is": "this machine has available", "unpredicted": []},
        "stages_that_do_not_fit": found,
    }
    assert "evaluate will need 6.0 GiB of memory, it has 4.0" in fits.unfit(said)
    assert "train" not in fits.unfit(said)
    would = fits.what_would(said)
    assert "evaluate.per_device_batch_size=8 (3.0 GiB)" in would and "drop `compress:`" in would
    assert footprints.unfit(pipeline, peaks, {"evaluate": 6.0, "compress": 6.0}, iter(())) == []
    assert fits.refused(said)


@pytest.mark.parametrize(
    ("objective", "known"),
    [
        ("sft", True),
        ({"kind": "distillation", "teacher": "t"}, True),
        ({"kind": "distillation", "teacher": "t", "level": "sequence"}, False),
        ({"kind": "grpo", "reward_model": "r"}, False),
    ],
)
def test_what_nobody_can_know_is_said_and_refuses_nothing(objective, known):
    sentences = advise.unpredicted(TrainConfig(objective=objective, base_model="base"))
    memory = {"fits": False, "train_gib": 9.0, "limit_gib": 8.0, "unpredicted": sentences}
    assert (not sentences) == known
    assert fits.refused({"memory": memory, "stages_that_do_not_fit": []}) == known


def test_with_two_phases_the_batches_of_both_are_made_smaller():
    config = settings(
        per_device_batch_size=2, adapter="lora", first={"source": "s", "per_device_batch_size": 4}
    )
    (first, second), *_ = (list(way) for way in smaller.alternatives(config))
    assert first[0] == (
        "train.per_device_batch_size=1 train.gradient_accumulation_steps=2 "
        "train.first.per_device_batch_size=2 train.first.gradient_accumulation_steps=2"
    )
    # The task's are one by one already.
    assert second[0] == "train.first.per_device_batch_size=1 train.first.gradient_accumulation_steps=4"
    assert (second[1].per_device_batch_size, second[1].first.per_device_batch_size) == (1, 1)


def test_a_bound_without_a_dry_run_is_for_one_model_and_the_larger_phase():
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 30522}
    limit = 90 * 2**20, 16 * 2**30
    assert sizing.surely_fits(settings(), shape, *limit)
    # Pieces of 4,096 tokens, 32 of them at once.
    wide = {"source": "s", "max_length": 4096, "per_device_batch_size": 32}
    assert not sizing.surely_fits(settings(first=wide), shape, *limit)
    taught = TrainConfig(objective={"kind": "distillation", "teacher": "t"}, base_model="base")
    assert not sizing.surely_fits(taught, shape, *limit)
    assert not sizing.surely_fits(settings(retain={"source": "s"}), shape, *limit)


def test_domain_text_is_read_and_what_of_it_is_trained_on(pipeline, tmp_path):
    write = tmp_path / "documents.jsonl"
    jsonl.write(write, [{"text": f"article {i}"} for i in range(90)])
    spec = load(str(tmp_path / "tiny.yaml"), [f"train.first.source={write}"])
    found = corpus.documents_to_size(spec, None, tmp_path / "scratch")
    train, watched, _ = spec.split.ratios
    assert found.total == 90 and found.train == round(90 * train / (train + watched))
    assert corpus.documents_to_size(pipeline, None, tmp_path) is None
    needs = SimpleNamespace(total_weights=1, moving_weights=1)
    given = spec, needs, tmp_path / "none", 0, [{"text": "x"}], 1, 0.5
    more = storage.left_bytes(*given, found)["ingest"] - storage.left_bytes(*given)["ingest"]
    assert more == pytest.approx(90 * len(json.dumps(found.rows[0], separators=(",", ":")) + "\n"), rel=0.03)


def test_what_is_judged_in_a_prediction_is_what_split_will_put_into_test(pipeline, tmp_path):
    rows, counted, in_all = corpus.examples_to_size(pipeline, None, tmp_path / "scratch")
    tests = corpus.tests_among(rows, pipeline.split)
    context = Context("run", "tiny", "split", "k" * 64, None, tmp_path / "out", tmp_path / "work")
    (tmp_path / "all").mkdir()
    jsonl.write(tmp_path / "all" / "examples.jsonl", rows)
    context.out.mkdir()
    inputs = {
        "examples": Artifact(
            SimpleNamespace(digest="all", metadata={"dataset_type": "prompt-completion"}), tmp_path / "all"
        )
    }
    split(pipeline.split.model_copy(update={"max_kl_nats": 100.0}), inputs, context)
    written = [row["id"] for row in jsonl.read(context.out / "test" / "examples.jsonl")]
    assert 0 < len(written) < len(rows) == in_all > counted
    assert sorted(written) == sorted(row["id"] for row in tests)
    brought = pipeline.split.model_copy(update={"test_source": "s3://elsewhere"})
    assert corpus.tests_among(rows, brought) == rows


def test_a_registered_model_is_read_without_its_weights(tmp_path, monkeypatch):
    from components.shared.manifest import FileEntry, Manifest

    files = [("config.json", 20), ("model-1.safetensors", 700), ("model-2.safetensors", 300)]
    whole = Manifest("model", tuple(FileEntry(name, size, "0" * 64) for name, size in files))
    fetched = []

    def get_tree(manifest, folder):
        fetched.extend(entry.path for entry in manifest.files)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(bases.registered, "manifest", lambda uri, store: whole)
    found = bases.weightless(
        "models:/legal@champion", "main", SimpleNamespace(get_tree=get_tree), tmp_path / "t"
    )
    assert fetched == ["config.json"] and found.file_bytes == 1000 and found.shape() == {}


def test_what_was_not_held_against_a_process_is_not_refused(pipeline):
    other = pipeline.model_copy(update={"train": settings().model_copy(update={"objective": _Named("dpo")})})
    assert footprints.unfit(other, {"compress": 2**50}, {"compress": 1.0}, iter(())) == []


class _Named(SimpleNamespace):
    def __init__(self, kind):
        super().__init__(kind=kind)


def test_the_bound_on_train_covers_the_batches_of_evaluate(pipeline):
    wide = pipeline.evaluate.model_copy(update={"per_device_batch_size": 64})
    assert fits._widest(pipeline.model_copy(update={"evaluate": wide})).per_device_batch_size == 64
    # 4,096 tokens are read at once, whatever the batches are.
    narrow = pipeline.evaluate.model_copy(update={"per_device_batch_size": 1})
    small = pipeline.train.model_copy(update={"per_device_batch_size": 1})
    spec = pipeline.model_copy(update={"evaluate": narrow, "train": small})
    assert fits._widest(spec).per_device_batch_size == 4096 // spec.train.max_length
