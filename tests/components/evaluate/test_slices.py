"""An evaluation in slices: one report, whoever computed what; nothing is done twice or lost unsaid."""

from __future__ import annotations

import json

import pytest

from components.evaluate import classes, predictions, sitting
from components.evaluate.config import METRICS, EvaluateConfig
from components.evaluate.evaluate import evaluate
from components.evaluate.slices import keeping, slice
from components.evaluate.slices.share import Part, Share, joined, rows
from components.shared import causal
from components.shared.commit import commit_name
from components.shared.errors import TuneyardError
from components.shared.stage import perform

RUN = {"id": "run-1", "pipeline": "legal", "slot": ""}
# What a machine is like and not what the model is like.
OF_A_MACHINE = {
    "latency_p50_ms",
    "latency_p95_ms",
    "tokens_per_second",
    "texts_per_second",
    "throughput_ratio",
    "memory_gib",
}
CONFIG = EvaluateConfig(per_device_batch_size=2, max_new_tokens=12)
CLASSES = EvaluateConfig(per_device_batch_size=16)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several batches of losses too, and one precision on any processor."""
    monkeypatch.setattr(sitting, "BATCH_TOKENS", 128)
    monkeypatch.setattr(causal, "preferred_precision", lambda setting: "float32")


@pytest.fixture(params=["causal-lm", "classification"])
def line(request, store):
    """Task, settings, and the manifests of an evaluation's inputs in the store."""
    named = {"causal-lm": "causal_inputs", "classification": "class_inputs"}[request.param]
    inputs = dict(request.getfixturevalue(named))
    if request.param == "causal-lm":
        inputs["compressed"] = inputs["model"]
    put = {name: store.put_tree(each.path, each.manifest.kind) for name, each in inputs.items()}
    return request.param, CONFIG if request.param == "causal-lm" else CLASSES, put


def one_slice(config, inputs, number, of):
    slice.perform(config, RUN, Share(number, of), inputs)


def joint(config, inputs, monkeypatch, of):
    """The commit of the stage behind `of` slices."""
    if of > 1:
        monkeypatch.setenv(keeping.ASKED, str(of))
    else:
        monkeypatch.delenv(keeping.ASKED, raising=False)
    return perform(evaluate, config, RUN, inputs)


def found(commit, store, folder):
    """All that was reported but for what was measured."""
    tree = store.get_tree(store.read_manifest(commit["outputs"]["evaluation"]), folder)
    document = json.loads((tree / "evaluation.json").read_text())
    del document["latency"]
    for system in document["systems"].values():
        for name in OF_A_MACHINE:
            system.pop(name, None)
    return document, (tree / "answers.jsonl").read_text()


def alone(config, inputs, store, monkeypatch, folder):
    """What one process reports, and its key; its commit is taken away again."""
    commit = joint(config, inputs, monkeypatch, 1)
    store.remove(commit_name("evaluate", commit["key"]))
    return found(commit, store, folder), commit


@pytest.fixture
def nothing_may_be_computed(monkeypatch):
    def forbid(*_, **__):
        pytest.fail("a model was put to work")

    def switch():
        monkeypatch.setattr(sitting, "sit", forbid)
        monkeypatch.setattr(predictions, "run", forbid)
        monkeypatch.setattr(causal, "load_base", forbid)

    return switch


@pytest.mark.parametrize("of", [2, 7])
def test_any_number_of_slices_reports_what_one_process_reports(
    line, store, monkeypatch, tmp_path, of, nothing_may_be_computed
):
    _, config, inputs = line
    expected, commit = alone(config, inputs, store, monkeypatch, tmp_path / "alone")
    # 7: more slices than some systems have batches
    for number in [1, *range(of, 1, -1)]:
        one_slice(config, inputs, number, of)
    documents = store.names(f"work/evaluate/{commit['key']}/")
    assert len(documents) == 2 * of
    nothing_may_be_computed()
    joined_commit = joint(config, inputs, monkeypatch, of)
    assert joined_commit["key"] == commit["key"]
    # Bit for bit: no batch is another than in one process.
    assert found(joined_commit, store, tmp_path / "joined") == expected
    assert store.names("work/") == []
    kinds = {name for metrics in METRICS.values() for name in metrics}
    assert kinds >= OF_A_MACHINE and set(joined_commit["metrics"]) == set(commit["metrics"])


def test_what_is_measured_is_of_the_first_slice_alone_and_the_report_says_so(
    line, store, monkeypatch, tmp_path
):
    task, config, inputs = line
    for number in (2, 1):
        one_slice(config, inputs, number, 2)
    (name,) = [n for n in store.names("work/") if n.endswith("slice-1-of-2.json")]
    measured = store.read_json(name)["measured"]["tuned"]
    (other,) = [n for n in store.names("work/") if n.endswith("slice-2-of-2.json")]
    assert not any(store.read_json(other)["measured"].values())
    commit = joint(config, inputs, monkeypatch, 2)
    for metric in ("latency_p50_ms", "latency_p95_ms", "memory_gib"):
        assert commit["metrics"][f"tuned_{metric}"] == measured[metric] > 0
    tree = store.get_tree(store.read_manifest(commit["outputs"]["evaluation"]), tmp_path / "tree")
    document = json.loads((tree / "evaluation.json").read_text())
    assert "on slice 1 of 2 alone: " in document["latency"]
    assert document["latency"].split()[-1] == {"causal-lm": "answers", "classification": "texts"}[task]


def test_a_killed_slice_is_done_again_and_the_others_are_not(
    line, store, monkeypatch, tmp_path, nothing_may_be_computed
):
    _, config, inputs = line
    expected, _ = alone(config, inputs, store, monkeypatch, tmp_path / "alone")
    one_slice(config, inputs, 1, 2)
    with monkeypatch.context() as killed:

        def kill(*_, **__):
            raise KeyboardInterrupt

        # At its very end: all is computed, and nothing is kept.
        killed.setattr(keeping, "keep", kill)
        with pytest.raises(KeyboardInterrupt):
            one_slice(config, inputs, 2, 2)
    assert store.read_json("runs/run-1/evaluate-slice-2-of-2.json")["status"] == "interrupted"
    assert [n.rsplit("/", 1)[1] for n in store.names("work/") if n.endswith(".json")] == ["slice-1-of-2.json"]
    one_slice(config, inputs, 2, 2)
    assert store.read_json("runs/run-1/evaluate-slice-2-of-2.json")["cached"] is False
    nothing_may_be_computed()
    for number in (1, 2):
        one_slice(config, inputs, number, 2)
        assert store.read_json(f"runs/run-1/evaluate-slice-{number}-of-2.json")["cached"] is True
    commit = joint(config, inputs, monkeypatch, 2)
    assert found(commit, store, tmp_path / "joined") == expected
    one_slice(config, inputs, 2, 2)  # after the commit there is nothing to do for anybody
    assert store.names("work/") == []


def lose_document(store, name):
    store.remove(f"{name}.json")


def lose_bytes(store, name):
    store.remove(f"{name}.safetensors")


def change_a_byte(store, name):
    key = store.key(f"{name}.safetensors")
    body = bytearray(store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read())
    body[-1] ^= 1
    store.client.put_object(Bucket=store.bucket, Key=key, Body=bytes(body))


def change_document(store, name):
    document = store.read_json(f"{name}.json")
    document["facts"]["cut"] = document["facts"]["window_tokens"] = 7
    store.write_json(f"{name}.json", document)


def cut_document(store, name):
    store.client.put_object(Bucket=store.bucket, Key=store.key(f"{name}.json"), Body=b'{"facts"')


def another_machine(store, name):
    from components.shared import digest

    document = store.read_json(f"{name}.json")
    del document["digest"]
    document["conditions"]["device"] = "cuda"
    store.write_json(f"{name}.json", document | {"digest": digest.of_value(document)})


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lose_document, "it is not in the store"),
        (lose_bytes, "is gone"),
        (change_a_byte, "is damaged (sha256"),
        (change_document, "another digest than it says"),
        (cut_document, "its document is damaged"),
        (another_machine, "'device': 'cuda'"),
    ],
)
def test_a_slice_that_is_missing_or_damaged_is_made_up_for_and_said(
    class_inputs, store, monkeypatch, tmp_path, caplog, harm, says
):
    inputs = {name: store.put_tree(each.path, each.manifest.kind) for name, each in class_inputs.items()}
    expected, commit = alone(CLASSES, inputs, store, monkeypatch, tmp_path / "alone")
    for number in (1, 2, 3):
        one_slice(CLASSES, inputs, number, 3)
    harm(store, f"work/evaluate/{commit['key']}/slice-2-of-3")
    computed = []
    original = classes.take

    def take(*arguments):
        computed.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(classes, "take", take)
    assert found(joint(CLASSES, inputs, monkeypatch, 3), store, tmp_path / "joined") == expected
    assert computed == [Share(2, 3)]
    (warning,) = [r.message for r in caplog.records if "its share is done here" in r.message]
    assert warning.startswith("slice 2 of 3: ") and says in warning


def test_a_slice_finds_what_the_stage_would_find_wrong_before_any_model_is_loaded(
    class_inputs, store, nothing_may_be_computed
):
    inputs = {name: store.put_tree(each.path, each.manifest.kind) for name, each in class_inputs.items()}
    nothing_may_be_computed()
    gates = EvaluateConfig(gates={"rouge_l": {"min": 0.5}})
    with pytest.raises(TuneyardError, match="rouge_l cannot be measured"):
        one_slice(gates, inputs, 1, 2)
    leaky = inputs | {"train": inputs["test"]}
    with pytest.raises(TuneyardError, match="test row leaked"):
        one_slice(CLASSES, leaky, 1, 2)
    assert store.read_json("runs/run-1/evaluate-slice-1-of-2.json")["error"]["what"].startswith("test row")


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_shares_hold_every_batch_once_and_weigh_about_the_same(of):
    batches = [[length] for length in range(100, 80, -1)]
    shares = [Share(number, of).take(batches) for number in range(1, of + 1)]
    assert sorted(batch for share in shares for batch in share) == sorted(batches)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [Share.read(str(Share(number, of))).number for number in range(1, of + 1)] == [*range(1, of + 1)]


@pytest.mark.parametrize("text", ["", "3 of 2", "0 of 2", "1/2", "1 of 2 "])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(TuneyardError, match="is no slice"):
        Share.read(text)


def test_parts_that_do_not_add_up_are_refused():
    one, other = Part(rows("a", [0, 2], [1.0, 3.0])), Part(rows("a", [1], [2.0]))
    assert joined([one, other, Part(rows("a", [], []))], "a").tolist() == [1.0, 2.0, 3.0]
    for parts in ([one], [one, other, other]):
        with pytest.raises(TuneyardError, match="a: the slices have"):
            joined(parts, "a")
