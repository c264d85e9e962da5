"""Around a stage: what is done is not done again, and whatever changed is."""

from __future__ import annotations

import errno
import subprocess
import sys
import time

import psutil
import pytest

from components.shared import clock, recording
from components.shared.errors import EXIT_STOPPED, StageStopped, StoreError, TuneyardError
from components.shared.settings import Settings
from components.shared.stage import Result, perform
from components.shared.store import Store

RUN = {"id": "run-1", "pipeline": "test"}


class Config(Settings):
    number: int = 1
    stop: str = ""
    source: str = ""
    holds: bool = True

    def external_uris(self):
        return [self.source] if self.source else []

    def still_true(self, summary):
        return self.holds


@pytest.fixture
def stage(store):
    """A stage `ingest` that counts how often it is really run."""
    calls = []

    def verb(config, inputs, context):
        calls.append(config)
        folder = context.out / "data"
        folder.mkdir()
        (folder / "number.txt").write_text(str(config.number % 10))
        if config.number == 99:
            raise TuneyardError("99 is too many", "take fewer")
        return Result(kinds={"data": "dataset"}, metrics={"n": 1.0}, summary={"n": 1}, stop=config.stop)

    verb.__module__ = "components.ingest.ingest"
    return lambda config, inputs=None, run=RUN: (perform(verb, config, run, inputs or {}), calls)


def test_an_unchanged_stage_is_not_run_again_and_says_so(stage, store):
    first, _ = stage(Config())
    second, calls = stage(Config(), run={"id": "run-2", "pipeline": "test"})
    assert len(calls) == 1 and first == second
    assert store.read_json("runs/run-1/ingest.json")["cached"] is False
    assert store.read_json("runs/run-2/ingest.json")["cached"] is True


def test_what_outlasted_a_lost_disk_goes_with_the_commit_and_not_before(stage, store):
    name = "work/ingest/{}/step-3/state.json"
    commit, _ = stage(Config())
    store.remove(f"stages/ingest/{commit['key']}.json")
    store.write_json(name.format(commit["key"]), {})
    store.write_json(name.format("another"), {})
    stage(Config())
    assert store.names("work/") == [name.format("another")]
    with pytest.raises(TuneyardError, match="99 is too many"):
        stage(Config(number=99))
    assert store.names("work/") == [name.format("another")]


def test_a_commit_tells_arithmetic_from_the_rest(store):
    def verb(config, inputs, context):
        for _ in range(2):
            with clock.arithmetic():
                time.sleep(0.05)
            time.sleep(0.05)
        return Result(kinds={})

    verb.__module__ = "components.ingest.ingest"
    for number in (1, 2):  # the second must not count the first's
        commit = perform(verb, Config(number=number), RUN, {})
        # Both are rounded to milliseconds, and two clocks count them.
        assert 0.09 <= commit["arithmetic_seconds"] <= commit["seconds"] - 0.09


def test_a_commit_says_how_much_memory_its_process_had(store):
    held = []

    def verb(config, inputs, context):
        held.append(bytearray(b"1") * 2**28)
        return Result(kinds={})

    verb.__module__ = "components.ingest.ingest"
    said = perform(verb, Config(number=1), RUN, {})["peak_memory_gib"]
    # The kernel rounds what a thread has not told it yet; other tests may have had more before.
    assert psutil.Process().memory_info().rss / 2**30 - 0.05 < said < psutil.virtual_memory().total / 2**30


def test_settings_inputs_and_outside_bytes_each_make_it_run(stage, store, tmp_path):
    source = tmp_path / "corpus.jsonl"
    source.write_text("1")
    config = Config(source=str(source))
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_text("a")
    one = store.put_tree(tmp_path / "tree", "dataset")
    (tmp_path / "tree" / "a").write_text("b")
    two = store.put_tree(tmp_path / "tree", "dataset")
    for count, (settings, manifest) in enumerate(
        [(config, one), (config, two), (config.model_copy(update={"number": 2}), two)], 1
    ):
        _, calls = stage(settings, {"x": manifest})
        assert len(calls) == count
    source.write_text("2")
    _, calls = stage(config, {"x": one})
    assert len(calls) == 4
    source.write_text("1")
    _, calls = stage(config, {"x": one})
    assert len(calls) == 4


def test_a_deleted_output_is_no_hit(stage, store):
    commit, _ = stage(Config())
    entry = store.read_manifest(commit["outputs"]["data"]).files[0]
    key = store.key(f"objects/{entry.sha256[:2]}/{entry.sha256}")
    store.client.delete_object(Bucket=store.bucket, Key=key)
    again, calls = stage(Config())
    assert len(calls) == 2 and store.has_tree(store.read_manifest(again["outputs"]["data"]))


def test_a_damaged_output_is_made_again_once_somebody_read_it(stage, store, tmp_path):
    commit, _ = stage(Config())
    manifest = store.read_manifest(commit["outputs"]["data"])
    sha256 = manifest.files[0].sha256
    key = store.key(f"objects/{sha256[:2]}/{sha256}")
    store.client.put_object(Bucket=store.bucket, Key=key, Body=b"2")
    reader = Store(store.root, tmp_path / "another-cache")
    with pytest.raises(TuneyardError, match="it will be made anew"):
        reader.get_tree(manifest, tmp_path / "back")
    again, calls = stage(Config())
    assert len(calls) == 2 and again["outputs"] == commit["outputs"]
    assert (reader.get_tree(manifest, tmp_path / "back") / "number.txt").read_text() == "1"


def test_an_effect_that_no_longer_holds_is_made_again_and_committed_anew(stage, store):
    stage(Config(holds=False))
    again, calls = stage(Config(holds=False), run={"id": "run-2", "pipeline": "test"})
    assert len(calls) == 2
    (name,) = store.names("stages/ingest/")
    assert store.read_json(name) == again and again["run"] == "run-2"


def test_of_two_that_did_the_same_work_the_first_commit_stands(store):
    def verb(config, inputs, context):
        (context.out / "data").mkdir()
        (context.out / "data" / "by.txt").write_text(context.run)
        if context.run == "run-1":  # a rival on another machine begins and ends meanwhile
            theirs.append(perform(verb, config, {"id": "run-2", "pipeline": "test"}, {}))
            (context.out / "data").mkdir(parents=True)
            (context.out / "data" / "by.txt").write_text(context.run)
        return Result(kinds={"data": "dataset"})

    theirs = []
    verb.__module__ = "components.ingest.ingest"
    ours = perform(verb, Config(), RUN, {})
    assert [ours] == theirs and ours["run"] == "run-2"
    (name,) = store.names("stages/ingest/")
    assert store.read_json(name) == ours


def test_a_stop_is_committed_and_stops_again(stage, store):
    for run in ("run-1", "run-2"):
        with pytest.raises(StageStopped, match=r"rouge_l 0\.1 is under 0\.2") as caught:
            stage(Config(stop="rouge_l 0.1 is under 0.2"), run={"id": run, "pipeline": "test"})
        assert caught.value.exit_code == EXIT_STOPPED
        assert store.read_json(f"runs/{run}/ingest.json")["status"] == "stopped"


def test_a_failure_leaves_a_record_and_no_commit(stage, store):
    with pytest.raises(TuneyardError, match="99 is too many"):
        stage(Config(number=99))
    record = store.read_json("runs/run-1/ingest.json")
    assert record["status"] == "failed" and record["error"]["todo"] == "take fewer"
    assert store.names("stages/ingest/") == []


def test_a_failure_that_cannot_be_recorded_is_still_the_one_that_is_told(stage, monkeypatch):
    def refuse(store, run, name, status, **facts):
        if status == "failed":
            raise StoreError("the store is down too", "start it")

    monkeypatch.setattr(recording, "record", refuse)
    with pytest.raises(TuneyardError, match="99 is too many"):
        stage(Config(number=99))


def test_a_store_that_is_down_does_not_make_a_done_stage_undone(stage, store, monkeypatch):
    stage(Config())

    def fail(*_):
        raise StoreError("the store is down", "start it")

    with monkeypatch.context() as down:
        down.setattr(Store, "has_tree", fail)
        with pytest.raises(StoreError):
            stage(Config())
    _, calls = stage(Config())
    assert len(calls) == 1


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device", "/"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_with_its_folder_and_what_is_free(store, fault):
    def verb(config, inputs, context):
        raise fault

    verb.__module__ = "components.ingest.ingest"
    with pytest.raises(TuneyardError, match=r"the disk is full.* [\d,]+ bytes are free under /") as caught:
        perform(verb, Config(), RUN, {})
    assert "TUNEYARD_HOME" in caught.value.todo
    assert store.read_json("runs/run-1/ingest.json")["error"] == caught.value.facts()


def test_equal_bytes_from_another_setting_cut_off_early(stage):
    one, _ = stage(Config(number=3))
    other, calls = stage(Config(number=13))
    assert len(calls) == 2 and one["outputs"] == other["outputs"]


def test_deepspeeds_word_for_machines_without_a_gpu_is_not_heard_and_others_are(capfd):
    """Where a model is saved, transformers asks whether it is one of DeepSpeed's, which imports all of it."""
    pytest.importorskip("deepspeed")
    code = (
        "from components.shared.stage import settle_in; settle_in()\n"
        "import deepspeed\n"
        "from deepspeed.accelerator import get_accelerator; get_accelerator()\n"
        "from deepspeed.utils import logger; logger.warning('another word')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Setting accelerator" not in done.stdout + done.stderr
    assert "another word" in done.stdout + done.stderr
