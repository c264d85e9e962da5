"""Ports: free, distinct, remembered, and honest about who holds the one that was wanted."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.shared.errors import UsageError
from pipelines.embedded.ports import PORT_NAMES, fixed_ports, grpc_socket, is_free, settle_ports
from pipelines.embedded.state import State, load_state, runtime_folder, save_state

ALL = {"s3", "server", "ui"}


def test_first_ports_are_distinct_and_free_and_remembered_ones_stay() -> None:
    first = settle_ports(Path("/some/home"), {}, {}, held=set(), wanted=ALL)
    assert set(first) == set(PORT_NAMES)
    assert len(set(first.values())) == len(PORT_NAMES)
    assert all(is_free(port) for port in first.values())
    assert settle_ports(Path("/some/home"), first, {}, held=set(), wanted=ALL) == first


def test_homes_begin_their_search_at_different_places() -> None:
    begun = {settle_ports(Path(f"/home-{n}"), {}, {}, set(), ALL)["s3"] for n in range(20)}
    assert len(begun) > 15  # 600 places for 20 homes: three or more shared ones have odds of 1 in 300


def test_a_busy_remembered_port_is_replaced_alone() -> None:
    first = settle_ports(Path("/some/home"), {}, {}, set(), ALL)
    with socket.create_server(("127.0.0.1", first["filer"])):
        second = settle_ports(Path("/some/home"), first, {}, set(), ALL)
        held = settle_ports(Path("/some/home"), first, {}, held={"s3"}, wanted=ALL)
    assert {name for name in PORT_NAMES if first[name] != second[name]} == {"filer"}
    assert held == first  # ours, and running


def test_a_port_whose_socket_name_is_somebody_elses_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first = settle_ports(Path("/some/home"), {}, {}, set(), ALL)
    squatted = grpc_socket("master_grpc", first["master_grpc"])
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(str(squatted))
        try:
            assert settle_ports(Path("/some/home"), first, {}, set(), ALL) == first  # our own left-over
            monkeypatch.setattr(os, "getuid", lambda: squatted.stat().st_uid + 1)
            moved = settle_ports(Path("/some/home"), first, {}, set(), ALL)
        finally:
            squatted.unlink()
    assert {name for name in PORT_NAMES if first[name] != moved[name]} == {"master_grpc"}


def test_a_fixed_port_wins_over_a_remembered_one_of_another_service() -> None:
    first = settle_ports(Path("/some/home"), {}, {}, set(), ALL)
    fixed = {"ui": first["serving"]}
    second = settle_ports(Path("/some/home"), first, fixed, set(), ALL)
    assert second["ui"] == first["serving"]
    assert len(set(second.values())) == len(PORT_NAMES)


def test_every_wrong_fixed_port_is_named_at_once() -> None:
    wrong = {"TUNEYARD_S3_PORT": "http", "TUNEYARD_SERVING_PORT": "70000", "TUNEYARD_UI_PORT": ""}
    with pytest.raises(UsageError, match=r"TUNEYARD_S3_PORT='http'.*TUNEYARD_SERVING_PORT='70000'"):
        fixed_ports(wrong)
    with pytest.raises(UsageError, match="TUNEYARD_UI_PORT=9000 is also TUNEYARD_S3_PORT"):
        fixed_ports({"TUNEYARD_S3_PORT": "9000", "TUNEYARD_UI_PORT": "9000"})
    assert fixed_ports({"TUNEYARD_UI_PORT": " 9000 "}) == {"ui": 9000}


@given(st.text())
def test_no_text_makes_a_port_number_that_is_none(text: str) -> None:
    try:
        fixed = fixed_ports({"TUNEYARD_S3_PORT": text})
    except UsageError:
        return
    assert all(1 <= port <= 65535 for port in fixed.values())


def test_a_copied_home_forgets_the_ports_of_the_original(tmp_path: Path) -> None:
    original, copy = tmp_path / "one", tmp_path / "two"
    original.mkdir()
    save_state(original, State(str(original), "/tmp/tuneyard-x", {"s3": 20001}))
    assert load_state(original).ports == {"s3": 20001}
    original.rename(copy)
    assert load_state(copy) == State(str(copy))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"home": 1}', json.dumps({"home": "", "runtime": "", "ports": []})]
)
def test_a_damaged_memory_is_started_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "platform.json").write_text(text)
    assert load_state(tmp_path) == State(str(tmp_path))


def test_the_socket_folder_is_short_private_and_replaced_when_it_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    folder = runtime_folder(State("home"))
    try:
        assert len(os.fsencode(folder)) <= 80
        assert folder.stat().st_mode & 0o777 == 0o700
        assert runtime_folder(State("home", str(folder))) == folder
        folder.chmod(0o755)  # somebody else could have put sockets there
        other = runtime_folder(State("home", str(folder)))
        assert other != folder
        other.rmdir()
    finally:
        folder.rmdir()
