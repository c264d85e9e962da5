"""Set-up on a small checkout of its own: real venvs, real pip, and wheels made here in place of an index."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

# Real venvs and real pip: seconds each.
pytestmark = pytest.mark.slow
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
# An editable build needs a backend, and there is no index to take setuptools from.
BACKEND = """\
import zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "small-1.0-py3-none-any.whl"
    info = "small-1.0.dist-info/"
    with zipfile.ZipFile(folder + "/" + name, "w") as wheel:
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: small\\nVersion: 1.0\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""
PROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "small"
version = "1.0"
"""


def make_wheel(folder: Path, name: str, version: str) -> str:
    """A wheel with one module, `NAME.py`; returns its pin without a newline."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"


@dataclass
class Checkout:
    """A small checkout, its folder of wheels, and what its set-up commands said."""

    root: Path
    wheels: Path
    said: list[str]

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def site(self) -> Path:
        return next(self.venv.glob("lib/python*/site-packages"))

    def start(self, **environment: str) -> subprocess.Popen[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        return subprocess.Popen(
            ["sh", "requirements/setup.sh"],
            cwd=self.root,
            env=kept | offline | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def setup(self, **environment: str) -> tuple[int, str]:
        process = self.start(**environment)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said


def small_checkout(root: Path) -> Checkout:
    wheels = root / "wheels"
    (root / "requirements").mkdir(parents=True)
    wheels.mkdir()
    for name in ("setup.sh", "setup.py", "pip_run.py"):
        shutil.copy(REQUIREMENTS / name, root / "requirements")
    (root / "pyproject.toml").write_text(PROJECT)
    (root / "backend.py").write_text(BACKEND)
    pins = [make_wheel(wheels, name, "1.0") for name in ("alder", "beech")]
    cuda = [make_wheel(wheels, "torch", "2.0"), make_wheel(wheels, "nvidia_small", "1.0")]
    absent = f"torch==2.0+cpu ; sys_platform == 'linux' --hash=sha256:{'0' * 64}"
    elsewhere = cuda[0].replace(" --hash", " ; sys_platform != 'linux' --hash")
    (root / "requirements" / "cpu.txt").write_text("\n".join([*pins, absent, elsewhere, ""]))
    (root / "requirements" / "cuda.txt").write_text("\n".join([*cuda, ""]))
    return Checkout(root, wheels, [])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout that two commands set up at the same time, from nothing."""
    small = small_checkout(tmp_path_factory.mktemp("setup") / "checkout")
    first = small.start()
    try:
        deadline = time.monotonic() + 60
        while not (small.venv / "setup.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        second = small.start()
        for process in (first, second):
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
            small.said.append(said)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    yield small


def modules(small: Checkout) -> list[str]:
    return sorted(path.stem for path in small.site.glob("*.py") if not path.stem.startswith("_"))


def half_done(small: Checkout) -> None:
    """Puts the record back to what it says while distributions go in."""
    record = small.venv / "setup.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"state": "started"}))


@pytest.fixture()
def setup_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REQUIREMENTS))
    spec = importlib.util.spec_from_file_location("house_setup", REQUIREMENTS / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_at_once_make_one_venv_and_the_second_waits(checkout: Checkout) -> None:
    first, second = checkout.said
    assert "making .venv" in first and "done:" in first
    assert "waiting" in second and "making .venv" not in second


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere PyTorch has one build")
def test_without_a_cpu_build_the_cuda_build_and_its_runtime_come_and_that_is_said(checkout: Checkout) -> None:
    assert "pip finds no CPU build" in checkout.said[0]
    assert modules(checkout) == ["alder", "beech", "nvidia_small", "torch"]


def test_a_set_up_checkout_runs_nothing_and_says_nothing(checkout: Checkout) -> None:
    before = (checkout.venv / "setup.log").stat().st_mtime_ns
    assert checkout.setup() == (0, "")
    assert (checkout.venv / "setup.log").stat().st_mtime_ns == before


def test_a_killed_attempt_is_completed(checkout: Checkout) -> None:
    """What SIGKILL leaves: a distribution without its list of files, one with a cut file, one not there."""
    next(checkout.site.glob("alder-*.dist-info/RECORD")).unlink()
    (checkout.site / "beech.py").write_text("vers")
    shutil.rmtree(next(checkout.site.glob("torch-*.dist-info")))
    (checkout.site / "torch.py").unlink()
    half_done(checkout)
    code, said = checkout.setup()
    assert code == 0, said
    assert "half installed, so again: alder-1.0, beech-1.0" in said
    assert (checkout.site / "beech.py").read_text() == "version = '1.0'\n"
    assert {"alder", "beech", "torch"} <= set(modules(checkout))
    assert checkout.setup() == (0, "")


def test_a_changed_project_is_installed_again_without_its_dependencies(checkout: Checkout) -> None:
    log = checkout.venv / "setup.log"
    before = len(log.read_text())
    project = checkout.root / "pyproject.toml"
    project.write_text(project.read_text() + "# changed\n")
    code, said = checkout.setup()
    assert (code, "making .venv" in said) == (0, False)
    assert "--editable" in log.read_text()[before:] and "--require-hashes" not in log.read_text()[before:]


def test_a_download_that_is_not_the_locked_file_is_refused(checkout: Checkout) -> None:
    wheel = next(checkout.wheels.glob("alder-*.whl"))
    locked = wheel.read_bytes()
    for path in [checkout.site / "alder.py", *checkout.site.glob("alder-*.dist-info/*")]:
        path.unlink()
    half_done(checkout)
    wheel.write_bytes(locked + b"\0")
    code, said = checkout.setup()
    wheel.write_bytes(locked)
    assert (code, "Traceback" in said) == (1, False)
    assert "not the file that the lock names" in said
    assert checkout.setup()[0] == 0
    assert "alder" in modules(checkout)


def test_an_index_that_does_not_answer_is_an_error_that_says_what_to_do(checkout: Checkout) -> None:
    shutil.rmtree(next(checkout.site.glob("alder-*.dist-info")))
    half_done(checkout)
    nowhere = {"PIP_NO_INDEX": "0", "PIP_FIND_LINKS": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    code, said = checkout.setup(**nowhere, PIP_RETRIES="0")
    assert (code, "Traceback" in said) == (1, False)
    assert "cannot get what it needs from its package index" in said
    assert "HTTPS_PROXY" in said and "setup.log" in said
    assert checkout.setup()[0] == 0


def test_a_venv_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    small = small_checkout(tmp_path / "checkout")
    small.venv.mkdir()
    (small.venv / "precious").write_text("mine")
    code, said = small.setup()
    assert code == 1
    assert "this set-up did not make it" in said
    assert [path.name for path in small.venv.iterdir()] == ["precious"]


def test_a_machine_without_a_usable_python_is_told_what_to_install(tmp_path: Path) -> None:
    small = small_checkout(tmp_path / "checkout")
    broken = tmp_path / "python-without-venv"
    broken.write_text("#!/bin/sh\necho \"has no module 'ensurepip'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    code, said = small.setup(PYTHON=str(broken))
    assert code == 1
    assert f"{broken}: has no module 'ensurepip'" in said
    assert "python3-venv" in said
    assert not small.venv.exists()


def test_too_little_disk_is_said_before_the_work(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(setup_module.NEEDED_GIB, "cpu", 10**6)
    with pytest.raises(setup_module.SetupError, match=r"GiB free, and set-up needs 10000\d\d\.\d GiB"):
        setup_module.check_machine(tmp_path, "cpu")


def test_every_pin_of_the_real_locks_is_read_back(setup_module: ModuleType) -> None:
    for name in ("cpu.txt", "cuda.txt", "gpu.txt"):
        lock = REQUIREMENTS / name
        pins = setup_module.entries(lock)
        assert "".join(pins) == lock.read_text()[lock.read_text().index(pins[0]) :]
        assert all(pin.count("--hash=sha256:") >= 1 for pin in pins)
        names = {setup_module.name_of(pin) for pin in pins}
        assert "torch" in names
        assert setup_module.built_from_source(lock) - {"nothing"} <= names
