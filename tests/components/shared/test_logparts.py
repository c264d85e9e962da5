"""What a stage in a pod says is in the store while it says it, and no fault of the store is the stage's."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from components.shared import logparts
from components.shared.errors import StoreError
from components.shared.progress import PREFIX, Progress
from components.shared.stage import settle_in


@pytest.fixture
def pod(store, monkeypatch):
    """A store, in a pod whose log is in a hurry."""
    monkeypatch.setenv("KFP_POD_NAME", "little-abc12-system-container-impl-1234")
    monkeypatch.setattr(logparts, "_SHORTEST_SECONDS", 0.05)
    return store


@pytest.fixture
def ours(monkeypatch):
    """What `settle_in` sets up ends with the test."""
    handlers, level = logging.root.handlers[:], logging.getLogger("tuneyard").level
    signals = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("tuneyard").setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)


def say(text):
    sys.stdout.write(f"{text}\n")


def texts(store, run="run-1"):
    return [logparts.read(store, part) for part in logparts.parts(store, run)]


def seen(store, word, seconds=10.0):
    """Whether a word comes to be in the store's logs of a run."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if word in "".join(texts(store)):
            return True
        time.sleep(0.05)
    return False


def test_what_is_printed_logged_and_counted_is_there_while_the_stage_runs_and_whole_at_its_end(
    pod, capsys, ours
):
    with logparts.shipped("run-1", "train"):
        settle_in()
        say("printed")
        logging.getLogger("tuneyard.train").info("logged")
        assert seen(pod, "logged")
        Progress("train", 2, "steps").advance(2)
        sys.stderr.write("no end of line")
    say("afterwards")
    said = "".join(texts(pod))
    assert [line.rstrip() for line in said.splitlines()] == [
        "printed", "logged", f"{PREFIX}train  2/2 steps    0:00 left", "no end of line",
    ]  # fmt: skip
    parts = logparts.parts(pod, "run-1")
    assert [part.number for part in parts] == list(range(1, len(parts) + 1)) and len(parts) >= 2
    assert {(part.stage, part.attempt) for part in parts} == {("train", os.environ["KFP_POD_NAME"])}
    assert "printed" in capsys.readouterr().out  # and as ever in the pod's own log


def test_outside_of_a_pod_nothing_is_left_in_the_store(store, monkeypatch):
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    with logparts.shipped("run-1", "train"):
        say("hello")
    assert store.names(logparts.FOLDER) == []


def test_a_line_of_progress_goes_where_another_follows_it(pod, monkeypatch):
    monkeypatch.setattr(logparts, "_SHORTEST_SECONDS", 60.0)
    with logparts.shipped("run-1", "train"):
        for number in range(3):
            say(f"{PREFIX}train  {number}/9 steps")
        say("a checkpoint")
        say(f"{PREFIX}train  4/9 steps")
        say(f"{PREFIX}judge  1/2 examples")
    assert texts(pod) == [
        f"{PREFIX}train  2/9 steps\na checkpoint\n{PREFIX}train  4/9 steps\n{PREFIX}judge  1/2 examples\n"
    ]


def test_why_a_stage_died_is_in_its_log(pod):
    with pytest.raises(ZeroDivisionError), logparts.shipped("run-1", "train"):
        say(1 // 0)
    assert "ZeroDivisionError" in texts(pod)[-1]


def test_a_pod_that_is_ended_leaves_its_last_lines(pod):
    lines = [
        "import time",
        "from components.shared.logparts import shipped",
        "from components.shared.stage import settle_in",
        "with shipped('run-1', 'train'):",
        "    settle_in()",
        "    try: print('ready', flush=True); time.sleep(60)",
        "    finally: print('the last words')",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    assert "the last words" in "".join(texts(pod))


def test_what_is_left_when_the_store_comes_back_is_all_of_it_and_once(pod, monkeypatch):
    real, away = logparts._Shipping._put, []

    def put(shipping, name, body):
        away.append(name)
        if 1 < len(away) < 5:
            raise StoreError("storing a log: the S3 store failed")
        real(shipping, name, body)
        if len(away) == 5:  # its answer is lost
            shipping._part = name, body
            raise StoreError("storing a log: the S3 store failed")

    monkeypatch.setattr(logparts._Shipping, "_put", put)
    with logparts.shipped("run-1", "train"):
        for number in range(8):
            say(f"line {number}")
            time.sleep(0.1)
    assert "".join(texts(pod)) == "".join(f"line {number}\n" for number in range(8))
    assert len(set(away[1:6])) == 1  # one name, until it is sure


def test_a_store_that_is_away_neither_fails_nor_holds_up_the_stage_and_is_told(pod, monkeypatch, caplog):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    started = time.monotonic()
    with logparts.shipped("run-1", "train"):
        for number in range(1000):
            say(f"line {number}")
        assert time.monotonic() - started < 1
    assert time.monotonic() - started < logparts._PATIENCE_SECONDS + 1
    assert "the end of this log is in the pod alone, not in the store (storing a log" in caplog.text


def test_a_log_is_bounded_and_its_end_is_kept(pod, monkeypatch):
    monkeypatch.setattr(logparts, "_MOST_BYTES", 2000)
    monkeypatch.setattr(logparts, "_END_BYTES", 200)
    with logparts.shipped("run-1", "train"):
        say("the beginning")
        for number in range(1500):
            say(f"line {number}")
            time.sleep(0.001)
        assert seen(pod, "the beginning")
        time.sleep(0.2)
        say("x" * 5000 + "\nthe end")
    said = "".join(texts(pod))
    assert "the beginning" in said and said.endswith("the end\n") and "in the pod's own log alone" in said
    assert len(said) < 2 * 2000 + 2 * 200


def test_a_forked_worker_neither_hangs_nor_says_what_it_inherits_again_nor_gathers_what_it_says(pod):
    def work():
        before = len(sys.stdout._said)
        say("of the worker")
        os._exit(len(sys.stdout._said) - before)

    with logparts.shipped("run-1", "train"):
        say("of the stage")
        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        worker.join(10)
        assert worker.exitcode == 0
    assert "".join(texts(pod)) == "of the stage\n"


def test_who_asks_for_what_is_new_gets_that_alone_whatever_the_clocks_say(pod):
    for number in range(2):
        with logparts.shipped("run-1", "train"):
            say(number)
        time.sleep(0.01)
    first, second = logparts.parts(pod, "run-1")
    assert logparts.parts(pod, "run-1", first.name) == [second]
    assert logparts.parts(pod, "run-1", logparts.before("run-1", second, 60)) == [first, second]
    assert logparts.parts(pod, "run-1", logparts.before("run-1", second, -60)) == []
