"""What is said of each end of a run, to whom, and what happens when nobody takes it."""

from __future__ import annotations

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from components.notify import notify
from components.notify.config import NotifyConfig
from components.shared import slots
from components.shared.errors import StoreError, TuneyardError

RUN = {"id": "run-1", "pipeline": "sft_legal", "slot": "", "due": ""}
DONE = {"status": "done", "cached": False, "seconds": 2.0, "key": "k"}


def ending(store, slot="", stages=(), **records):
    for stage, record in records.items():
        store.write_json(f"runs/run-1/{stage}.json", {"stage": stage} | record)
    return notify.ending("run-1", "sft_legal", slot, stages or list(records), store)


def test_a_failure_is_told_with_its_stage_its_reason_and_what_to_do(store):
    error = {"what": "no row is left", "todo": "look at quarantine", "exit_code": 1}
    ended = ending(store, ingest=DONE, validate={"status": "failed", "error": error})
    assert ended.event == "failed"
    assert all(part in ended.text for part in ("sft_legal", "run-1", "at validate", "no row", "quarantine"))


def test_a_stage_that_was_killed_is_the_one_that_never_went_beyond_running(store):
    ended = ending(store, ingest=DONE, train={"status": "running"})
    assert ended.event == "failed" and "at train" in ended.text and "killed" in ended.text


def test_a_slice_that_was_killed_is_named_and_slices_are_no_stages(store):
    slices = {"evaluate-slice-1-of-2": DONE, "evaluate-slice-2-of-2": {"status": "running"}}
    ended = ending(store, stages=["train", "evaluate"], train=DONE, **slices)
    assert ended.event == "failed" and "at evaluate-slice-2-of-2" in ended.text and "killed" in ended.text
    slices["evaluate-slice-2-of-2"] = DONE
    ended = ending(store, stages=["train", "evaluate"], train=DONE, evaluate=DONE, **slices)
    assert ended.event == "done" and "2 stages in 4 s" in ended.text


def test_a_gate_is_told_from_a_failure(store):
    error = {"what": "rouge_l 0.1 is under 0.2", "todo": "", "exit_code": 3}
    ended = ending(store, ingest=DONE, evaluate={"status": "stopped", "error": error})
    assert ended.event == "stopped" and "rouge_l 0.1 is under 0.2" in ended.text


@pytest.mark.parametrize("records", [{}, {"ingest": DONE, "validate": DONE}])
def test_a_stage_without_a_record_never_got_a_pod(store, records):
    ended = ending(store, stages=["ingest", "validate", "train"], **records)
    first = "train" if records else "ingest"
    assert ended.event == "failed" and f"before {first} began" in ended.text and "its image" in ended.text


@pytest.mark.parametrize(("champion", "event"), [(False, "done"), (True, "failed")])
def test_only_a_version_that_is_not_champion_needs_no_deploy(store, champion, event):
    store.write_json("stages/register/k.json", {"summary": {"champion": champion}})
    assert ending(store, stages=["register", "deploy"], register=DONE).event == event


@pytest.mark.parametrize(
    ("slot", "cached", "event"),
    [("20261201030000", True, "no-version"), ("20261201030000", False, "done"), ("", True, "done")],
)
def test_only_a_scheduled_run_that_registered_nothing_is_a_silence_to_tell(store, slot, cached, event):
    assert ending(store, slot, ingest=DONE, register=DONE | {"cached": cached}).event == event


@pytest.fixture
def hook(monkeypatch):
    """A webhook: the status codes it will answer with, and what it was sent."""
    codes, sent = [], []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            sent.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(codes.pop(0) if codes else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(notify.URL_VARIABLE, f"http://127.0.0.1:{server.server_port}/services/T0/secret")
    monkeypatch.setattr(notify.time, "sleep", lambda _: None)
    yield codes, sent
    server.shutdown()


def test_it_posts_what_slack_takes_and_only_the_ends_that_were_asked_for(store, hook, caplog):
    _, sent = hook
    ending(store, ingest=DONE)
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.NOTSET)
    assert notify.tell(NotifyConfig(on=("done",)), ending(store)) is True
    assert [list(each) for each in sent] == [["text"]] and "run-1" in sent[0]["text"]
    assert notify.tell(NotifyConfig(), ending(store)) is False and len(sent) == 1
    assert "/services/" not in "".join(r.getMessage() for r in caplog.records if r.name.startswith("httpx"))


def test_a_webhook_that_is_busy_is_tried_again_and_one_that_refuses_is_named_by_its_host_alone(store, hook):
    codes, sent = hook
    ending(store, ingest={"status": "running"})
    codes[:] = [503, 429]
    assert notify.tell(NotifyConfig(), ending(store, stages=["ingest"])) is True and len(sent) == 3
    codes[:] = [404]
    with pytest.raises(TuneyardError) as refused:
        notify.tell(NotifyConfig(), ending(store))
    assert "127.0.0.1" in str(refused.value) and "404" in str(refused.value)
    assert "secret" not in str(refused.value).replace("Secret tuneyard-notify", "") and len(sent) == 4


def test_a_store_that_is_down_is_told_too(store, hook, monkeypatch):
    _, sent = hook
    monkeypatch.setattr(notify.Store, "names", lambda *_: (_ for _ in ()).throw(StoreError("S3 is down")))
    notify.main(NotifyConfig(), RUN, ["ingest"])
    assert len(sent) == 1 and "S3 is down" in sent[0]["text"]


def test_a_scheduled_run_is_told_with_its_slot_and_not_with_what_the_schedule_passed(store, hook):
    _, sent = hook
    ending(store, ingest=DONE, register=DONE | {"cached": True})
    given = {"slot": slots.asked("UTC", "0 3 1 * *"), "due": "2026-12-01T03:00:04Z"}
    notify.main(NotifyConfig(), RUN | given, ["ingest", "register"])
    assert "slot 20261201030000" in sent[0]["text"] and "[[" not in sent[0]["text"]


@pytest.mark.parametrize("url", [":abc", "http://127.0.0.1:1/a\x7f b"])
def test_an_address_that_is_none_is_named_and_ends_nothing(store, hook, monkeypatch, url, capsys):
    monkeypatch.setenv(notify.URL_VARIABLE, url + "\n")
    notify.main(NotifyConfig(), RUN, ["ingest"])
    assert notify.URL_VARIABLE in capsys.readouterr().err


def test_a_good_run_stays_good_when_nobody_can_be_told(store, hook, capsys, monkeypatch):
    codes, _ = hook
    codes[:] = [404]
    ending(store, ingest={"status": "running"})
    notify.main(NotifyConfig(), RUN, ["ingest"])
    monkeypatch.delenv(notify.URL_VARIABLE)
    assert notify.tell(NotifyConfig(), ending(store)) is False
    said = capsys.readouterr().err
    assert "status 404" in said and f"{notify.URL_VARIABLE} is not set" in said
