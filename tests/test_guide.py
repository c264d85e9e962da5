"""Every command that the README and the guide show exists and takes the options it is shown with.

And what the README says a machine needs is what `submit` asks of it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from pipelines.cli import app
from pipelines.embedded.preflight import DISK_GIB, MEMORY_GIB

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "kubernetes.md"]
LINES = [
    line.strip().split("  #")[0]
    for page in PAGES
    for line in page.read_text().splitlines()
    if re.match(r"    (make|\.venv/bin/tuneyard) ", line)
]


def test_there_are_commands():
    assert len(LINES) >= 12


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make")])
def test_make_knows_the_target_and_its_variables(line):
    words = shlex.split(line)
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    target = next(word for word in words[1:] if "=" not in word)
    rule = re.search(rf"^{target}:.*?(?=^\S|\Z)", (ROOT / "Makefile").read_text(), re.M | re.S)
    assert rule
    for variable in (word.split("=")[0] for word in words[1:] if "=" in word):
        assert variable in rule.group(), f"{target} does not use {variable}"


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(".venv")])
def test_tuneyard_parses_it(line):
    _, name, *arguments = shlex.split(line)
    command = get_command(app).commands[name]
    context = command.make_context(name, arguments)
    assert context.params


def test_the_readme_asks_for_what_submit_asks_for():
    said = re.findall(r"(\d+) GiB of (disk|memory)", (ROOT / "README.md").read_text())
    assert said == [(str(DISK_GIB), "disk"), (str(MEMORY_GIB), "memory")]
