"""Secrets, certificates, the supervisor's settings and the look at the machine before anything starts."""

from __future__ import annotations

import shlex
import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervisor.options import UnhosedConfigParser, expand

from components.shared.errors import TuneyardError, UsageError
from pipelines.embedded import preflight as preflight_module
from pipelines.embedded import services
from pipelines.embedded.certificates import ensure_certificates
from pipelines.embedded.credentials import credentials_path, ensure_credentials, load_credentials
from pipelines.embedded.platform import home_dir, preflight
from pipelines.embedded.supervisor import quote_command


def test_credentials_are_generated_once_and_closed_to_others(tmp_path: Path) -> None:
    made = ensure_credentials(tmp_path)
    path = credentials_path(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    assert ensure_credentials(tmp_path) == load_credentials(tmp_path) == made
    assert path.stat().st_mode & 0o777 == 0o600
    other = tmp_path / "other"
    other.mkdir()
    secrets = [*vars(made).values(), *vars(ensure_credentials(other)).values()]
    assert len(set(secrets)) == len(secrets)
    assert min(len(secret) for secret in secrets) >= 20


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"s3_access_key": "A"}'])
def test_damaged_credentials_say_what_to_do(tmp_path: Path, text: str) -> None:
    credentials_path(tmp_path).write_text(text)
    with pytest.raises(TuneyardError, match=r"credentials.json is damaged(.|\n)*make down"):
        ensure_credentials(tmp_path)


def test_missing_credentials_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TuneyardError, match="make up"):
        load_credentials(tmp_path)


def test_certificates_fit_together_and_are_kept(tmp_path: Path) -> None:
    ensure_certificates(tmp_path)
    context = ssl.create_default_context(cafile=str(tmp_path / "authority.crt"))
    context.load_cert_chain(tmp_path / "node.crt", tmp_path / "node.key")
    first = (tmp_path / "node.key").read_bytes()
    ensure_certificates(tmp_path)
    assert (tmp_path / "node.key").read_bytes() == first
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) == 3  # the authority's key is nowhere


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" ;#%'\"\\()s"))))
def test_any_command_reaches_the_supervisor_unchanged(words: list[str]) -> None:
    """Through the very steps supervisor takes: its ini reader, its expansion, its split."""
    parser = UnhosedConfigParser()
    parser.read_string(f"[program:x]\ncommand = {quote_command(['run', *words])}\n")
    expanded = expand(parser.get("program:x", "command"), {"program_name": "x"}, "command")
    assert shlex.split(expanded) == ["run", *words]


def test_preflight_names_every_fault_with_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "weed"
    monkeypatch.setattr(preflight_module, "weed_executable", lambda: missing)
    with pytest.raises(TuneyardError) as refused:
        preflight(tmp_path / "not" / "yet", disk_gib=1e6, memory_gib=1e6)
    message = str(refused.value)
    assert message.count("1000000.0 GiB") == 2
    assert str(missing) in message
    missing.touch(mode=0o755)
    preflight(tmp_path, disk_gib=0.001, memory_gib=0.001)


def test_preflight_sees_the_limit_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gib = 2**30
    (tmp_path / "memory.max").write_text(f"{2 * gib}\n")
    (tmp_path / "memory.current").write_text(f"{int(1.75 * gib)}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {gib // 8}\nactive_file {gib // 8}\n")
    monkeypatch.setattr(preflight_module, "CGROUP", tmp_path)
    assert preflight_module.available_memory_gib() == 0.5
    (tmp_path / "memory.stat").write_text("anon 5\n")
    assert preflight_module.available_memory_gib() > 0.5
    assert "memory limit of this container cannot be read (KeyError: 'inactive_file')" in caplog.text
    caplog.clear()
    (tmp_path / "memory.max").write_text("max\n")
    assert preflight_module.available_memory_gib() > 0.5
    assert not caplog.text


def test_the_home_is_in_the_checkout_or_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNEYARD_HOME", raising=False)
    monkeypatch.setattr(services, "CHECKOUT", tmp_path)
    with pytest.raises(UsageError, match="TUNEYARD_HOME"):
        home_dir()
    (tmp_path / "pyproject.toml").touch()
    assert home_dir() == tmp_path / ".tuneyard"
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path / "elsewhere"))
    assert home_dir() == tmp_path / "elsewhere"
