"""Makes .venv from a lock and puts the project in it: `make setup`, which every other target runs first.

It needs Python's standard library alone. Nothing changed costs one read of .venv/setup.json. That file is
written before anything else is and says what .venv is being made from, so an attempt that was killed goes
on where it stopped, while a .venv made from other locks is made anew. pip does the downloads, so its own
configuration (mirror, proxy, certificates, folders of wheels) counts; all it says is in .venv/setup.log.

The locks pin every distribution by sha256 and are installed without asking what depends on what. They go
in batches: each batch that is in stays in, whatever happens to the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pip_run import Pip, SetupError, say

LAYOUT = 1  # a higher number makes every .venv anew
BATCH = 24
NEEDED_GIB = {"cpu": 3, "cuda": 7, "gpu": 8}  # 2.7, 6.4 and 6.8 seen
TEMPORARY_GIB = {"cpu": 1, "cuda": 3, "gpu": 3}
ENTRY = re.compile(r"^[a-z0-9][a-z0-9.-]*=", re.MULTILINE)
CUDA_BUILD_INSTEAD = """\
pip finds no CPU build of PyTorch that the lock names, so this takes the registry's CUDA build. It works on
a CPU as well, but it and its CUDA runtime are 2.5 GB more to download and 4 GB more on disk.
For the CPU build, stop this, remove .venv, and tell pip of a place that has it: an index, with
PIP_EXTRA_INDEX_URL=... (PyTorch's install page names its index of CPU builds), or a folder of wheels, with
PIP_FIND_LINKS=... The lock names the CPU build of Python 3.11 on x86_64 Linux."""


def read_state(venv: Path) -> dict[str, str]:
    """What .venv was made from, or {} when there is none or its record is unreadable."""
    try:
        state = json.loads((venv / "setup.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(venv: Path, state: dict[str, str]) -> None:
    """Replaces the record in one move, so that a reader sees the old one or the new one."""
    aside = venv / "setup.json.new"
    aside.write_text(json.dumps(state, indent=1) + "\n")
    aside.replace(venv / "setup.json")


def wanted(root: Path, extra: str, state: dict[str, str]) -> dict[str, str]:
    """What .venv should be made from: `made_from` covers the locks, `project` covers pyproject.toml.

    A Python that turns up earlier on the PATH does not make a .venv anew; one that is asked for does.
    """
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = running if os.environ.get("PYTHON") else state.get("python", running)
    names = ["gpu.txt"] if extra == "gpu" else ["cpu.txt", "cuda.txt"]
    # The scripts in .venv/bin carry the folder's name, so a moved checkout needs a new .venv.
    parts = [f"{LAYOUT} {extra} {python} {root}".encode()]
    for name in names:
        lines = (root / "requirements" / name).read_bytes().splitlines()
        parts += [line for line in lines if not line.lstrip().startswith(b"#")]
    return {
        "extra": extra,
        "python": python,
        "made_from": hashlib.sha256(b"\0".join(parts)).hexdigest(),
        "project": hashlib.sha256((root / "pyproject.toml").read_bytes()).hexdigest(),
        "state": "done",
    }


def is_done(venv: Path, want: dict[str, str]) -> bool:
    """Whether .venv is what it should be and its Python is still there (an upgrade can take it away)."""
    return read_state(venv) == want and (venv / "bin" / "python").exists()


@contextlib.contextmanager
def one_at_a_time(root: Path) -> Iterator[int]:
    """Holds this checkout's set-up lock; the descriptor goes to pip too, so that an orphan still holds it."""
    with open(root / "requirements" / "setup.py", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this checkout is running: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def check_machine(root: Path, build: str, have_bytes: int = 0) -> None:
    """Raises SetupError when a disk is too full for `build` (a key of NEEDED_GIB).

    Args:
        root: the checkout.
        build: which PyTorch is coming, and with it how much.
        have_bytes: what an earlier attempt has already put in .venv.
    """
    temporary = Path(tempfile.gettempdir())
    needs = {root: NEEDED_GIB[build] - have_bytes / 2**30}
    if os.stat(temporary).st_dev == os.stat(root).st_dev:
        needs[root] += TEMPORARY_GIB[build]
    else:
        needs[temporary] = TEMPORARY_GIB[build]
    faults = []
    for folder, gib in needs.items():
        free = shutil.disk_usage(folder).free / 2**30
        if free < gib:
            faults.append(f"{folder} has {free:.1f} GiB free, and set-up needs {gib:.1f} GiB there.")
    if faults:
        raise SetupError(" ".join(faults), "Free some space. TMPDIR=... moves the temporary files.")


def entries(lock: Path) -> list[str]:
    """The lock's pins, each with its hashes."""
    text = lock.read_text()
    starts = [match.start() for match in ENTRY.finditer(text)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def name_of(entry: str) -> str:
    """The distribution an entry pins."""
    return entry.split("=", 1)[0]


def built_from_source(lock: Path) -> set[str]:
    """The distributions that the lock says have no wheel."""
    match = re.search(r"^# built from source: (.*)$", lock.read_text(), re.MULTILINE)
    return set(match[1].split()) if match else set()


def folder_bytes(folder: Path) -> int:
    """How much a folder's files hold."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def drop_half_installed(site: Path) -> list[str]:
    """Makes pip forget each distribution whose files are not all there, and returns their names.

    pip writes a distribution's list of files (RECORD) last, so a killed pip leaves one that has none, or
    whose files differ from it in size.
    """
    dropped = []
    for info in sorted(site.glob("*.dist-info")):
        record = info / "RECORD"
        whole = record.exists()
        for line in record.read_text().splitlines() if whole else []:
            path, _, size = line.rpartition(",")
            file = site / path.rsplit(",", 1)[0].strip('"')
            if size and not (file.exists() and file.stat().st_size == int(size)):
                whole = False
        if not whole:
            shutil.rmtree(info)
            dropped.append(info.name.removesuffix(".dist-info"))
    return dropped


def empty_venv(root: Path, venv: Path, started: dict[str, str]) -> None:
    """Makes .venv anew, with pip alone in it.

    Raises:
        SetupError: .venv is there and set-up did not make it, or Python's venv fails.
    """
    if venv.exists() and any(venv.iterdir()) and not (venv / "setup.json").exists():
        raise SetupError(f"{venv} is there, and this set-up did not make it.", "Move it away or remove it.")
    venv.mkdir(exist_ok=True)
    write_state(venv, started | {"state": "empty"})
    for old in venv.iterdir():
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old.name != "setup.json":
            old.unlink()
    say(f"making .venv with Python {sys.version.split()[0]}")
    answer = subprocess.run(
        [sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True, cwd=root
    )
    if answer.returncode:
        last = (answer.stdout + answer.stderr).strip().splitlines()[-3:]
        raise SetupError(f"{sys.executable} -m venv failed: {' '.join(last)}", "Try another one: PYTHON=...")
    write_state(venv, started)


def install_torch(root: Path, pip: Pip, pins: list[str]) -> list[str]:
    """Puts in the CPU build of PyTorch on Linux, or names what to install in its place.

    Returns:
        the pins that are left to install.

    Raises:
        SetupError: pip cannot reach what it is configured to use.
    """
    cpu = [pin for pin in pins if name_of(pin) == "torch" and "+cpu" in pin]
    if not sys.platform.startswith("linux") or not cpu:
        return pins
    say("looking for PyTorch's CPU build")
    if pip.install_if_offered(cpu):
        return [pin for pin in pins if name_of(pin) != "torch"]
    for line in CUDA_BUILD_INSTEAD.splitlines():
        say(line)
    check_machine(root, "cuda")
    return [pin for pin in pins if name_of(pin) != "torch"] + entries(root / "requirements" / "cuda.txt")


def install_locked(root: Path, pip: Pip, extra: str) -> None:
    """Installs the lock: wheels in batches, then what has to be built with the wheels there."""
    lock = root / "requirements" / f"{extra}.txt"
    pins = entries(lock)
    source = built_from_source(lock)
    pip.expected = len(pins)
    if extra == "cpu":
        pins = install_torch(root, pip, pins)
        pip.expected = max(pip.expected, len(pins))
    wheels = [pin for pin in pins if name_of(pin) not in source]
    for start in range(0, len(wheels), BATCH):
        pip.install(wheels[start : start + BATCH], "--only-binary=:all:")
    built = [pin for pin in pins if name_of(pin) in source]
    if built:
        pip.install(built, "--no-build-isolation")


def compile_bytecode(venv: Path) -> None:
    """Write all bytecode, on all processors.

    Where PYTHONDONTWRITEBYTECODE is set, every process would compile again: 8 of 14 s of `import peft`.
    """
    say("compiling bytecode")
    command = [str(venv / "bin" / "python"), "-m", "compileall", "-q", "-j", "0", str(venv / "lib")]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def make(root: Path, venv: Path, want: dict[str, str], lock_descriptor: int) -> None:
    """Brings .venv to `want`, from nothing, from a killed attempt, or by installing the project again.

    Raises:
        SetupError: something that the reader can mend; what is done so far stays done.
    """
    extra = want["extra"]
    if extra == "gpu" and not sys.platform.startswith("linux"):
        raise SetupError("EXTRA=gpu needs Linux with an NVIDIA GPU.", "Leave EXTRA out for the CPU.")
    started = want | {"state": "started"}
    state = read_state(venv)
    stage = state.get("state", "empty") if state.get("made_from") == want["made_from"] else "empty"
    if stage == "empty" or not (venv / "bin" / "python").exists() or not Pip.works(venv):
        check_machine(root, extra)
        empty_venv(root, venv, started)
    elif stage == "started":
        check_machine(root, extra, folder_bytes(venv))
        [site] = venv.glob("lib/python*/site-packages")
        dropped = drop_half_installed(site)
        again = f" (half installed, so again: {', '.join(dropped)})" if dropped else ""
        say(f"going on with the .venv of an earlier attempt{again}")
    else:
        write_state(venv, started | {"state": "locked"})
    pip = Pip(venv, lock_descriptor)
    if read_state(venv)["state"] == "started":
        install_locked(root, pip, extra)
        compile_bytecode(venv)
        write_state(venv, started | {"state": "locked"})
    say("installing the project (editable)")
    pip.run("install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", str(root))
    write_state(venv, want)


def main() -> int:
    """Reads the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extra", choices=["cpu", "gpu"], help="left out: what .venv has, else cpu")
    parser.add_argument(
        "--check", action="store_true", help="only say, by the exit code, whether all is done"
    )
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    venv = root / ".venv"
    state = read_state(venv)
    want = wanted(root, arguments.extra or state.get("extra", "cpu"), state)
    if is_done(venv, want) or arguments.check:
        return 0 if is_done(venv, want) else 1
    try:
        with one_at_a_time(root) as descriptor:
            if not is_done(venv, want):
                make(root, venv, want, descriptor)
                say(f"done: {venv}")
    except SetupError as error:
        say(f"{error}")
        return 1
    except KeyboardInterrupt:
        say("stopped. The next make goes on from here.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
