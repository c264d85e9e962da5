"""Pins what LLaMA-Factory runs on: `python -m benchmarks.peers.lock` writes llamafactory.txt beside it.

uv resolves what LLaMA-Factory asks for, for all platforms, less what training text on a CPU does not import.
PyTorch is the build that requirements/cpu.txt pins, so that all contenders compute with the same one.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

LIST = Path(__file__).with_name("llamafactory.txt")
OURS = Path(__file__).resolve().parents[2] / "requirements" / "cpu.txt"
WANTED = "llamafactory==0.9.5"
# Its build on the registry loads PyTorch's CUDA build; text needs nothing of it (see llamafactory.py).
AUDIO = "torchaudio"
LEFT_OUT = (
    *("aiohttp", "hf-transfer", "hf-xet", "modelscope"),  # downloads: nothing is downloaded
    *("av", "scipy", "torchdata", AUDIO, "torchvision"),  # sound, pictures, its unfinished next version
    *("fastapi", "fire", "gradio", "matplotlib", "sse-starlette", "tyro", "uvicorn"),  # pages, servers, plots
    *("protobuf", "sentencepiece", "tiktoken"),  # tokenizers of other formats
    *("triton", "cuda-bindings", "cuda-toolkit", "nvidia-cudnn-cu13", "nvidia-cusparselt-cu13"),
    *("nvidia-nccl-cu13", "nvidia-nvshmem-cu13"),  # CUDA
)
_LEFT_OUT = textwrap.fill(
    ", ".join(sorted(LEFT_OUT)),
    100,
    initial_indent="#   ",
    subsequent_indent="#   ",
    break_on_hyphens=False,
)
HEAD = f"""\
# {WANTED} and what training text with it on a CPU imports.
# Made by `python -m benchmarks.peers.lock`; do not edit. Installed as it stands, without asking what depends
# on what. Left out of what it and PyTorch declare:
{_LEFT_OUT}
"""


def entries(text: str) -> list[str]:
    """The pins of a list, each with its hashes."""
    return re.split(r"^(?=[a-z0-9][a-z0-9.-]*=)", text, flags=re.MULTILINE)[1:]


def name_of(entry: str) -> str:
    """The distribution that an entry pins."""
    return entry.split("=", 1)[0]


def resolve(torch: str) -> list[str]:
    """What uv pins, with hashes, for every platform and Python from 3.11 on.

    Args:
        torch: the version of PyTorch that the others must fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, without, output = (Path(folder, name) for name in ("asked.in", "without.txt", "list.txt"))
        asked.write_text(f"{WANTED}\ntorch=={torch}\n")
        without.write_text("\n".join(LEFT_OUT))
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--no-header"]
        command += ["--python-version", "3.11", "--generate-hashes", "--no-annotate"]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--excludes", str(without)]
        subprocess.run([*command, str(asked), "-o", str(output)], check=True)
        return entries(output.read_text())


def main() -> None:
    """Write the list."""
    torch = [entry for entry in entries(OURS.read_text()) if name_of(entry) == "torch"]
    version = re.match(r"torch==([0-9.]+)", torch[0])
    assert version is not None, f"{OURS} pins no torch"
    pins = [entry for entry in resolve(version[1]) if name_of(entry) != "torch"]
    LIST.write_text(HEAD + "".join(sorted([*pins, *torch])))
    print(f"{LIST.name}: {len({name_of(entry) for entry in pins}) + 1} distributions")


if __name__ == "__main__":
    main()
