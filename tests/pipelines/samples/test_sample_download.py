"""Wheels are taken only as pinned, kept for the next store, and never left half done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from components.shared.errors import TuneyardError
from pipelines.samples import download
from pipelines.samples.catalogue import Copy, Package, Sample


def _wheel(package: Package, home: Path) -> Path:
    with download.locked(home):
        return download.wheel(package, home)


def _kept(home: Path) -> list[str]:
    return sorted(
        p.relative_to(home / "downloads").as_posix() for p in (home / "downloads").rglob("*") if p.is_file()
    )


@pytest.fixture
def package(put_wheel: Callable[..., Package]) -> Package:
    return put_wheel("tiny-corpus", {"a.txt": b"a" * 100}, {"a.txt": "a.txt"})


def test_a_wheel_is_kept_by_digest_and_needs_no_registry_again(
    tmp_path: Path, shelf: Path, package: Package
) -> None:
    first = _wheel(package, tmp_path)
    assert first.read_bytes() == (shelf / package.file).read_bytes()
    (shelf / package.file).unlink()
    assert _wheel(package, tmp_path) == first
    assert _kept(tmp_path) == [".lock", f"{package.sha256}/{package.file}"]


def test_a_flipped_byte_is_refused_and_nothing_is_kept(tmp_path: Path, shelf: Path, package: Package) -> None:
    path = shelf / package.file
    content = bytearray(path.read_bytes())
    content[content.index(b"aaaa")] ^= 1
    path.write_bytes(content)
    with pytest.raises(TuneyardError) as caught:
        _wheel(package, tmp_path)
    assert f"tiny-corpus 1.0: {package.file} has sha256 " in str(caught.value)
    assert f"expected {package.sha256}" in str(caught.value)
    assert str(tmp_path / "downloads" / package.sha256 / package.file) in caught.value.todo
    assert _kept(tmp_path) == [".lock"]


def test_a_missing_package_is_named_with_what_pip_said(tmp_path: Path, shelf: Path, package: Package) -> None:
    (shelf / package.file).unlink()
    with pytest.raises(TuneyardError) as caught:
        _wheel(package, tmp_path)
    message = str(caught.value)
    assert f"pip did not deliver tiny-corpus 1.0 as {package.file} (sha256 {package.sha256})" in message
    assert "No matching distribution found for tiny-corpus==1.0" in message
    assert str(tmp_path / "downloads" / package.sha256 / package.file) in caught.value.todo
    assert _kept(tmp_path) == [".lock"]


def test_a_copy_put_by_hand_where_the_message_says_is_used(
    tmp_path: Path, shelf: Path, package: Package
) -> None:
    place = tmp_path / "downloads" / package.sha256
    place.mkdir(parents=True)
    (shelf / package.file).rename(place / package.file)
    assert _wheel(package, tmp_path) == place / package.file


def test_a_damaged_cache_is_fetched_again(
    tmp_path: Path, shelf: Path, package: Package, caplog: pytest.LogCaptureFixture
) -> None:
    cached = _wheel(package, tmp_path)
    cached.write_bytes(b"half a whe")
    with caplog.at_level(logging.WARNING, "tuneyard.samples"):
        assert _wheel(package, tmp_path).read_bytes() == (shelf / package.file).read_bytes()
    assert "was damaged on disk" in caplog.text


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    with download.locked(tmp_path):
        left = tmp_path / "downloads" / ".scratch-killed"
        left.mkdir()
        (left / "half.whl").write_bytes(b"half")
    with download.locked(tmp_path):
        assert not left.exists()


def test_too_little_disk_is_said_before_anything_is_fetched(tmp_path: Path, package: Package) -> None:
    small = Sample(
        uri="s3://b/p/",
        what="w",
        licence="l",
        size=2**10,
        scratch=2**10,
        convert=Copy(kind="copy"),
        packages=(package,),
    )
    with pytest.raises(TuneyardError, match=r"s3://b/p/ needs 1048577 MiB of disk and .* MiB free"):
        download.require_room([small.model_copy(update={"size": 2**40})], tmp_path)
    download.require_room([small], tmp_path)
