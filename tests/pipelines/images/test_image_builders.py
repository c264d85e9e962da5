"""What docker, podman and buildah are asked, with programs that write down their arguments in their place."""

from __future__ import annotations

import json
import os
import sys
import tarfile

import pytest

from components.shared.errors import TuneyardError, UsageError
from pipelines.images import builders, debootstrap, running

DIGEST = "sha256:" + "a" * 64
PROGRAM = f"""#!{sys.executable}
import json, os, sys
arguments = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *arguments]) + "\\n")
for argument in arguments:
    if argument.startswith("--digestfile="):
        open(argument.split("=", 1)[1], "w").write("{DIGEST}\\n")
if arguments[:2] == ["image", "inspect"]:
    print(json.dumps(["elsewhere/cpu@sha256:" + "b" * 64, "r.example.com/t/cpu@{DIGEST}"]))
if "from" in arguments[:1]:
    print("working-container")
if os.environ.get("FAILS", "-") in arguments:
    print(os.environ["SAYS"])
    sys.exit(3)
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What the stand-ins were called with, and only they are on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in builders.NAMES:
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.parametrize("name", builders.NAMES)
def test_a_build_names_its_target_base_time_and_labels(calls, tmp_path, name):
    builder = builders.find(name)
    builders.build(builder, tmp_path, "cpu", "t:1", "base:1", 1234, {"a": "b"})
    [call] = calls()
    assert call[:2] == [name, "build"] and call[-1] == str(tmp_path)
    assert {"--target", "cpu", "--tag", "t:1", "--build-arg=BASE=base:1", "--label=a=b"} <= set(call)
    assert "--build-arg=SOURCE_DATE_EPOCH=1234" in call
    assert ("--timestamp=1234" in call) == (name != "docker")


def test_without_a_base_the_dockerfiles_own_is_taken(calls, tmp_path):
    builders.build(builders.find("podman"), tmp_path, "cpu", "t:1", "", 1234, {})
    assert not [each for each in calls()[0] if "BASE" in each]


@pytest.mark.parametrize("name", builders.NAMES)
def test_a_push_returns_the_digest_that_the_registry_has(calls, name):
    assert builders.push(builders.find(name), "localhost/tuneyard/cpu:1", "r.example.com/t/cpu") == DIGEST
    assert any("push" in call for call in calls())


def test_a_container_of_buildah_is_removed_also_when_its_command_fails(calls, monkeypatch):
    monkeypatch.setenv("FAILS", "run")
    monkeypatch.setenv("SAYS", "boom")
    with pytest.raises(TuneyardError, match="ended with 3"):
        builders.run(builders.find("buildah"), "t:1", ["true"])
    assert [call[1] for call in calls()] == ["from", "run", "rm"]


@pytest.mark.parametrize(
    ("said", "todo"),
    [
        ("BuildKit is enabled but the buildx component is missing or broken.", "docker-buildx-plugin"),
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "start the Docker service"),
    ],
)
def test_what_docker_lacks_is_said(calls, tmp_path, monkeypatch, said, todo):
    monkeypatch.setenv("FAILS", "build")
    monkeypatch.setenv("SAYS", said)
    with pytest.raises(TuneyardError) as error:
        builders.build(builders.find("docker"), tmp_path, "cpu", "t:1", "", 1, {})
    assert todo in error.value.todo


@pytest.mark.parametrize(
    ("said", "todo"),
    [
        (
            "pinging container registry docker.example.com: dial tcp: no such host",
            "BASE=registry.example.com",
        ),
        ("cgroups in hybrid mode not supported", "BUILDAH_RUNTIME=runc"),
        ("something else", "the lines above"),
    ],
)
def test_a_build_that_fails_says_its_last_lines_and_what_to_do(calls, tmp_path, monkeypatch, said, todo):
    monkeypatch.setenv("FAILS", "build")
    monkeypatch.setenv("SAYS", said)
    with pytest.raises(TuneyardError) as error:
        builders.build(builders.find("buildah"), tmp_path, "cpu", "t:1", "", 1, {})
    assert said in error.value.what and todo in error.value.todo


def test_no_builder_is_said_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"docker, podman or buildah.*\n.*apt-get install buildah runc"):
        builders.find()
    with pytest.raises(UsageError, match="no podman on the PATH"):
        builders.find("podman")
    with pytest.raises(UsageError, match="kaniko"):
        builders.find("kaniko")


def test_pips_noise_is_not_among_the_last_lines_of_a_failure():
    program = "print(\"WARNING: Location 'x' is ignored: it\"); print(); print('real'); raise SystemExit(1)"
    with pytest.raises(TuneyardError) as error:
        running.stream([sys.executable, "-c", program], lambda text: text)
    assert error.value.todo == "real"


def test_a_packed_root_is_the_same_whenever_it_is_packed(tmp_path):
    root = tmp_path / "root"
    for name in ("usr/bin/sh", "etc/apt/sources.list", "var/log/dpkg.log", "usr/lib/a.pyc", "etc/passwd"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    debootstrap.pack(root, tmp_path / "one.tar", 1234)
    os.utime(root / "etc/passwd", (5, 5))
    debootstrap.pack(root, tmp_path / "two.tar", 1234)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as file:
        files = {entry.name for entry in file if entry.isfile()}
    assert files == {"./usr/bin/sh", "./etc/passwd"}


def test_debootstrap_says_all_that_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(debootstrap.shutil, "which", lambda name, path: None)
    with pytest.raises(UsageError, match=r"debootstrap is not installed.*needs root.*\n.*BASE="):
        debootstrap.make(builders.Builder("buildah", "buildah"), 1, compilers=False)


def test_an_apt_without_the_suite_is_said(monkeypatch, tmp_path):
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho 'http://mirror.example.com/debian trixie main'\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UsageError, match="no mirror of Debian bookworm"):
        debootstrap.mirror()
    apt.write_text("#!/bin/sh\necho 'http://mirror.example.com/debian bookworm main'\n")
    assert debootstrap.mirror() == "http://mirror.example.com/debian"


def test_docker_is_passed_over_where_its_daemon_does_not_answer(calls, monkeypatch):
    assert builders.find().name == "docker"
    monkeypatch.setenv("FAILS", "version")
    monkeypatch.setenv("SAYS", "Cannot connect to the Docker daemon")
    assert builders.find().name == "podman"
    assert builders.find("docker").name == "docker"  # who asks for it is told by it
