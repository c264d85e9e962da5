from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from components.shared import ledger, registry
from components.shared.errors import TuneyardError, UsageError
from components.shared.ledger import Change
from pipelines import promotion
from tests.rivals import rivals

NAME = "legal"
ROOT = Path(__file__).resolve().parents[2]


def add(store, folder, weights, verdict="passed"):
    """Register a model as the register stage does."""
    folder = folder / weights
    folder.mkdir()
    (folder / "model.safetensors").write_text(weights)
    manifest = store.put_tree(folder, "model")
    evidence = {"metrics": {"loss": 2.5}, "verdict": verdict}
    made = registry.register_version(NAME, store.manifest_uri(manifest), "", {"verdict": verdict})
    ledger.append(
        NAME, store, lambda _: Change("register", made.version, manifest.digest, "stage", "passed", evidence)
    )
    return manifest


@pytest.fixture
def two(mlflow_store, tmp_path):
    """Versions 1 and 2, none promoted yet."""
    return [add(mlflow_store, tmp_path, weights) for weights in ("one", "two")]


def test_promoting_without_a_version_takes_the_candidate(two):
    made = promotion.promote(NAME, None, "Ada", "reads better")
    assert (made.version, made.digest) == (2, two[1].digest)
    assert made.changed and made.previous_champion is None and not made.in_service
    assert registry.aliases(NAME) == {"candidate": 2, "champion": 2}
    entry = promotion.history(NAME)[-1]
    assert (entry.who, entry.why, entry.action) == ("Ada", "reads better", "promote")
    assert entry.evidence["metrics"] == {"loss": 2.5}
    assert str(made) == "legal version 2 is now champion, not deployed yet"
    again = promotion.promote(NAME, 2, "Ada", "")
    assert not again.changed and len(promotion.history(NAME)) == 3


def test_rolling_back_returns_to_the_champion_before(two):
    promotion.promote(NAME, 1, "Ada", "first")
    promotion.promote(NAME, 2, "Ada", "second")
    made = promotion.rollback(NAME, "Bob", "it invents statutes")
    assert (made.version, made.previous_champion, made.digest) == (1, 2, two[0].digest)
    assert registry.aliases(NAME)["champion"] == 1
    entry = promotion.history(NAME)[-1]
    assert (entry.who, entry.action, entry.evidence["undone"]) == ("Bob", "rollback", 2)
    with pytest.raises(UsageError, match=r"no earlier champion to go back to \(champion: 1\)"):
        promotion.rollback(NAME, "Bob", "more")


def test_a_failed_verdict_needs_force_and_force_needs_a_reason(mlflow_store, tmp_path):
    add(mlflow_store, tmp_path, "bad", verdict="failed")
    with pytest.raises(UsageError, match="its verdict is 'failed'"):
        promotion.promote(NAME, 1, "Ada", "please")
    with pytest.raises(UsageError, match="needs a reason"):
        promotion.promote(NAME, 1, "Ada", " ", force=True)
    assert registry.champion(NAME) is None
    promotion.promote(NAME, 1, "Ada", "the gate is wrong", force=True)
    assert promotion.history(NAME)[-1].evidence["forced"] is True
    assert registry.champion(NAME).version == 1


def test_what_is_not_there_is_said(two):
    with pytest.raises(TuneyardError, match=r"no version or alias 9; it has versions \[1, 2\]"):
        promotion.promote(NAME, 9, "", "")
    with pytest.raises(UsageError, match="nothing was ever registered as 'nobody'"):
        promotion.history("nobody")
    with pytest.raises(UsageError, match="no earlier champion"):
        promotion.rollback(NAME, "", "")
    with pytest.raises(TuneyardError, match="'nobody' has no version or alias 'candidate'"):
        promotion.promote("nobody", None, "", "")


def test_a_model_whose_bytes_are_gone_is_not_promoted(two, mlflow_store):
    sha256 = two[1].files[0].sha256
    key = mlflow_store.key(f"objects/{sha256[:2]}/{sha256}")
    mlflow_store.client.delete_object(Bucket=mlflow_store.bucket, Key=key)
    with pytest.raises(TuneyardError, match=r"version 2: files of .* are gone"):
        promotion.promote(NAME, 2, "", "")
    assert registry.champion(NAME) is None


def test_a_deployed_model_is_put_in_service_and_its_failure_is_told(two, mlflow_store, monkeypatch):
    """The server is tried in the tests of the deploy stage; here it is what `put_in_service` is asked for."""
    asked = []

    def put_in_service(name, store, url, token, ready_seconds):
        asked.append((name, url, token, ready_seconds, registry.champion(name).version))
        if len(asked) > 1:
            raise TuneyardError("the server is down", "run `tuneyard up`")

    fake = types.ModuleType("components.deploy.deploy")
    fake.put_in_service = put_in_service
    monkeypatch.setitem(sys.modules, "components.deploy.deploy", fake)
    monkeypatch.setenv("TUNEYARD_SERVING_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("TUNEYARD_SERVING_TOKEN", "secret")
    mlflow_store.write_json(f"deployments/{NAME}.json", {"version": 1})
    assert promotion.promote(NAME, 1, "Ada", "x").in_service
    assert asked == [(NAME, "http://127.0.0.1:1", "secret", 300, 1)]
    with pytest.raises(TuneyardError, match=r"version 2 is champion .* but .* the server is down"):
        promotion.promote(NAME, 2, "Ada", "x")
    assert ledger.champion(promotion.history(NAME)) == registry.champion(NAME).version == 2


def test_who_is_the_git_user_or_the_login_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGNAME", "ada")
    assert promotion.default_who() == "ada"
    (tmp_path / "gitconfig").write_text("[user]\nname = Ada L\nemail = ada@example.org\n")
    assert promotion.default_who() == "Ada L <ada@example.org>"


def test_people_who_promote_at_once_leave_one_champion(mlflow_store, tmp_path):
    for number in range(8):
        add(mlflow_store, tmp_path, f"weights-{number}")
    people = [(NAME, version, f"person {version}", "x") for version in range(1, 9)]
    assert rivals(promotion.promote, people) == [0] * 8
    entries = promotion.history(NAME)
    promoted = [entry for entry in entries if entry.action == "promote"]
    assert sorted(entry.version for entry in promoted) == list(range(1, 9))
    assert [entry.previous_champion for entry in promoted] == [None, *(e.version for e in promoted[:-1])]
    assert registry.aliases(NAME) == {"candidate": 8, "champion": promoted[-1].version}


def command(*arguments, **changed):
    """`tuneyard` in a process of its own: whom it asks is decided by the environment alone."""
    environment = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.server
def test_the_commands_act_on_the_store_that_the_environment_names(two, tmp_path):
    done = command("promote", NAME, "--version", "1", "--who", "Ada", "--why", "first", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 1
    assert registry.aliases(NAME)["champion"] == 1
    promotion.promote(NAME, 2, "Bob", "second")
    assert command("rollback", NAME, "--who", "Ada").returncode == 0
    assert registry.aliases(NAME)["champion"] == 1
    listed = command("history", NAME)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout == "".join(f"{promotion.told(entry)}\n" for entry in promotion.history(NAME))
    assert "promote version 1, by Ada: first\n" in listed.stdout
    assert "rollback version 1 (champion before: version 2), by Ada" in listed.stdout
    # No platform of this machine was brought up beside it.
    assert not (tmp_path / "home" / "platform.json").exists()
    assert not list((tmp_path / "home").glob("logs/*"))
    asked = command("ask", NAME, "What is a lease?")
    assert asked.returncode == 1 and f"{NAME} is not in service" in asked.stderr
    assert not (tmp_path / "home" / "platform.json").exists()


@pytest.mark.server
def test_what_of_a_cluster_is_not_named_is_said_before_anything_is_written(two):
    missing = {"MLFLOW_TRACKING_URI": None, "TUNEYARD_SERVING_TOKEN": None}
    done = command("promote", NAME, "--version", "1", **missing)
    assert done.returncode == 2
    assert "not set: MLFLOW_TRACKING_URI, TUNEYARD_SERVING_TOKEN" in done.stderr
    assert len(promotion.history(NAME)) == 2
