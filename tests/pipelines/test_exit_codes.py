"""The command ends with the exit code of what happened."""

from __future__ import annotations

import json

import pytest

from components.shared.errors import TuneyardError
from pipelines import cli, submit
from pipelines.report import Report


@pytest.mark.parametrize("code", [0, 1, 3, 130])
def test_submit_ends_with_the_code_of_the_run(monkeypatch, capsys, code):
    error = {"what": "loss 2 is over 1", "todo": "train better", "exit_code": code, "stage": "evaluate"}
    report = Report("run-1", "legal", exit_code=code, error=error if code else None)
    monkeypatch.setattr(submit, "run_local", lambda *_: report)
    monkeypatch.setattr(submit, "interruptible", lambda: None)
    monkeypatch.setattr("sys.argv", ["tuneyard", "submit", "legal", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert json.loads(capsys.readouterr().out)["exit_code"] == code


def test_our_errors_are_a_message_and_a_code(monkeypatch, capsys):
    def fail(*_):
        raise TuneyardError("the disk is full", "make room")

    monkeypatch.setattr(submit, "run_local", fail)
    monkeypatch.setattr(submit, "interruptible", lambda: None)
    monkeypatch.setattr("sys.argv", ["tuneyard", "submit", "legal", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and "the disk is full\n  -> make room" in err
    printed = json.loads(out)
    assert printed["error"]["what"] == "the disk is full" and printed["status"] == "failed"
    assert (printed["run_id"], printed["pipeline"], printed["stages"]) == ("", "legal", [])


def test_wrong_usage_is_two(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tuneyard", "submit", "sft_legal", "--no-such-option"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "no-such-option" in capsys.readouterr().err
