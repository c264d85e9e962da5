"""Pins every distribution by sha256: pyproject.toml -> cpu.txt, cuda.txt and gpu.txt beside this file.

    cpu.txt   everything; on Linux with PyTorch's CPU build
    cuda.txt  PyTorch's CUDA build and the CUDA runtime it loads: what a Linux machine takes in place of
              the CPU build when pip knows no place that has it
    gpu.txt   everything with the CUDA build and the `gpu` extra
    images/   what each image holds, as those pin it (image_locks.py)

The CPU build ("2.13.0+cpu") needs a line of its own. For `torch==2.13.0` with the hashes of both builds
pip prefers the file whose page states an allowed hash, and so takes the CUDA build past a CPU build that
lies in a plain folder; the CUDA build then misses its runtime, 2.2 GB of other distributions.

Run it with `make lock`. uv resolves for all platforms at once but does not read pip's configuration, so
the CPU build's hashes are asked of pip itself. Versions already locked are kept: to move one, change its
bound in pyproject.toml or delete its lines from gpu.txt.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import image_locks

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent / "pyproject.toml"
CUDA_RUNTIME = re.compile(r"^(nvidia-(?!ml-py)|cuda-|triton$)")
ENTRY = re.compile(r"^([a-z0-9][a-z0-9.-]*)===?([^\s;]+)")
CPU_BUILD_PYTHONS = ("3.11", "3.12", "3.13", "3.14")
CPU_BUILD_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_28_aarch64")


def resolve(requirements: Path, *options: str, kept: Path | None = None) -> str:
    """What uv pins for `requirements`, with hashes, for every platform and Python from 3.11 on.

    Args:
        requirements: pyproject.toml or a requirements file.
        *options: further options of `uv pip compile`.
        kept: a lock whose versions stay unless a requirement rules them out.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "lock.txt")
        if kept is not None and kept.exists():
            shutil.copy(kept, output)
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--no-header"]
        command += ["--python-version", "3.11", "--generate-hashes", "--annotation-style", "line"]
        command += ["--no-emit-index-url", "--no-emit-find-links", *options]
        subprocess.run([*command, str(requirements), "-o", str(output)], check=True, cwd=HERE.parent)
        return output.read_text()


def resolve_without(excluded: list[str], *options: str, kept: Path | None = None) -> str:
    """`resolve` for the project, leaving out the distributions named in `excluded`."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(excluded))
        file.flush()
        return resolve(PROJECT, "--extra", "dev", "--excludes", file.name, *options, kept=kept)


def entries(lock: str) -> dict[str, str]:
    """Each pinned distribution's name and its lines, in the lock's order."""
    found: dict[str, str] = {}
    name = ""
    for line in lock.splitlines(keepends=True):
        match = ENTRY.match(line)
        if match:
            name = match[1]
            found[name] = ""
        if name:
            found[name] += line
    return found


def built_from_source(lock: Path) -> list[str]:
    """The distributions of a lock that come as source alone, so that they must be built at set-up."""
    names: list[str] = []
    while True:
        allowed = [option for name in names for option in ("--no-binary", name)]
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--no-deps"]
        command += ["--python-version", "3.11", "--only-binary", ":all:", *allowed, str(lock)]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode == 0:
            return sorted(names)
        blamed = re.search(r"\b([a-z0-9.-]+)==\S+ has no usable wheels", answer.stderr)
        if blamed is None or blamed[1] in names:
            raise SystemExit(f"uv cannot tell which distributions have no wheel:\n{answer.stderr}")
        names.append(blamed[1])


def cpu_build_hashes(version: str) -> list[str]:
    """The sha256 of each CPU build of PyTorch that pip's own configuration reaches."""
    found = set()
    for python in CPU_BUILD_PYTHONS:
        for platform in CPU_BUILD_PLATFORMS:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--python-version", python, "--platform", platform, f"torch==={version}+cpu"]
            with tempfile.TemporaryDirectory() as folder:
                answer = subprocess.run([*command, "-d", folder], capture_output=True, text=True)
                for wheel in Path(folder).glob("*.whl"):
                    found.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
                    print(f"CPU build: {wheel.name}")
                if answer.returncode and "No matching distribution" not in answer.stderr:
                    raise SystemExit(f"pip cannot look for PyTorch's CPU build:\n{answer.stderr}")
    if not found:
        raise SystemExit("pip reaches no CPU build of PyTorch: give it an index or a folder that has one.")
    return sorted(found)


def cpu_torch(entry: str, version: str, hashes: list[str]) -> str:
    """cpu.txt's two lines for PyTorch: the CPU build on Linux, the only build elsewhere."""
    listed = " \\\n".join(f"    --hash=sha256:{digest}" for digest in hashes)
    linux = f"torch=={version}+cpu ; sys_platform == 'linux' \\\n{listed}\n"
    return linux + entry.replace(f"torch=={version}", f"torch=={version} ; sys_platform != 'linux'", 1)


def installer(kept: Path) -> str:
    """A lock of pip itself, which installs the images' distributions."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "pip.in")
        asked.write_text("pip\n")
        return resolve(asked, kept=kept)


def write(name: str, about: str, lines: dict[str, str], source: list[str]) -> None:
    """Writes one lock; `# built from source:` tells requirements/setup.py what has no wheel."""
    header = f"# {about} Made by `make lock`; do not edit.\n"
    built = " ".join(each for each in source if each in lines)
    body = "".join(lines[each] for each in sorted(lines))
    (HERE / name).write_text(f"{header}# built from source: {built or 'nothing'}\n{body}")
    print(f"requirements/{name}: {len(lines)} distributions")


def main() -> None:
    """Writes the locks."""
    kept = HERE / "gpu.txt"
    # onnxruntime-gpu replaces onnxruntime: both fill the same folder, and the later one breaks the earlier.
    gpu = entries(resolve_without(["onnxruntime"], "--extra", "gpu", kept=kept))
    runtime = [name for name in gpu if CUDA_RUNTIME.match(name)]
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder, "gpu.txt")
        pinned.write_text("".join(gpu.values()))
        source = built_from_source(pinned)
        cpu = entries(resolve_without(runtime, kept=pinned))
    match = ENTRY.match(gpu["torch"])
    assert match is not None
    version = match[2]
    cuda_build = gpu["torch"].replace("torch==", "torch===", 1)
    cpu["torch"] = cpu_torch(gpu["torch"], version, cpu_build_hashes(version))
    gpu["torch"] = cuda_build
    cuda = {name: gpu[name] for name in [*runtime, "torch"]}
    write("cpu.txt", "Everything, with PyTorch's CPU build.", cpu, source)
    write("cuda.txt", "PyTorch's CUDA build and the CUDA runtime it loads (Linux).", cuda, source)
    write("gpu.txt", "Everything, with PyTorch's CUDA build and the gpu extra (Linux).", gpu, source)
    image_locks.main(installer(image_locks.FOLDER / "build.txt"))


if __name__ == "__main__":
    main()
