"""Recordings, read alike wherever they are: when they come in, in training and when a model is judged."""

from __future__ import annotations

import hashlib
import io
import math
import wave
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from components.shared.errors import StageStopped, TuneyardError
from components.shared.media import BadMedia

SUFFIXES = (".wav",)
# An hour at 48 kHz: a recording of more is to be cut into utterances first.
_MAX_SAMPLES = 3600 * 48_000
_SILENCE_DB = -120.0
_SHOWN = 5
# A probe's numbers are of order one; another machine's arithmetic moves the fifth digit.
_SAME = 1e-3
_PROBED = 24


def decode(source: Path | bytes) -> tuple[Any, int, int]:
    """A WAV file of whole numbers as one channel, the mean of those that it has.

    Returns:
        float32 samples [-1, 1], how many a second, and how many channels the file has.

    Raises:
        BadMedia: it is no such file, holds less than its header says, nothing, or too much.
    """
    raw = source if isinstance(source, bytes) else source.read_bytes()
    if not raw:
        raise BadMedia("empty_file", "0 bytes")
    try:
        with wave.open(io.BytesIO(raw)) as file:
            channels, width, rate, claimed = file.getparams()[:4]
            if claimed > _MAX_SAMPLES:
                raise BadMedia("too_large", f"{claimed:,} samples, over {_MAX_SAMPLES:,}")
            body = file.readframes(claimed)
    except (wave.Error, EOFError) as error:
        seen = f"no WAV file of whole numbers ({error}); it begins with {raw[:8]!r}. Convert it to 16-bit WAV"
        raise BadMedia("unknown_format", seen) from error
    found = len(body) // (channels * width)
    if found < claimed:
        raise BadMedia("torn_file", f"{found:,} samples of the {claimed:,} that its header promises")
    if not found or not rate:
        raise BadMedia("empty_file", f"{found} samples at {rate} Hz")
    return _floats(body, width).reshape(found, channels).mean(axis=1), rate, channels


def _floats(body: bytes, width: int) -> Any:
    """Samples of 8 (unsigned), 16, 24 or 32 bits, little-endian, as float32 from -1 to 1."""
    import numpy as np

    if width == 1:
        return (np.frombuffer(body, dtype=np.uint8).astype(np.float32) - 128) / 128
    octets = np.frombuffer(body, dtype=np.uint8).reshape(-1, width)
    # The highest byte last: put in front of zeros it is a number of 32 bits.
    padded = np.zeros((len(octets), 4), dtype=np.uint8)
    padded[:, 4 - width :] = octets
    return (padded.view("<i4")[:, 0] / 2**31).astype(np.float32)


def measured(samples: Any, rate: int, channels: int) -> dict[str, Any]:
    """What the row of a recording says beside it (examples.MEASURED); `level_db` of full scale."""
    import numpy as np

    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return {
        "samples": hashlib.sha256(f"{rate}:".encode() + samples.tobytes()).hexdigest(),
        "seconds": round(len(samples) / rate, 4),
        "sample_rate": rate,
        "channels": channels,
        "level_db": round(10 * math.log10(power), 2) if power > 10 ** (_SILENCE_DB / 10) else _SILENCE_DB,
    }


def at_rate(samples: Any, rate: int, wanted: int) -> Any:
    """The same sound with another number of samples a second, what that cannot hold filtered out first."""
    import numpy as np
    from scipy.signal import resample_poly

    if rate == wanted:
        return samples
    common = math.gcd(rate, wanted)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


def read(path: str, extractor: Any) -> Any:
    """A recording as a feature extractor takes it."""
    samples, rate, _ = decode(Path(path))
    return at_rate(samples, rate, extractor.sampling_rate)


def open_processor(folder: Path) -> Any:
    """What turns recordings into a model's input, and token ids into text, as its base was trained.

    Raises:
        TuneyardError: the folder says nothing of that, or it is not for windows of log-mel features.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        _ = processor.feature_extractor.n_samples, processor.tokenizer.prefix_tokens
    except (OSError, ValueError, AttributeError) as error:
        raise TuneyardError(
            f"{folder}: no usable processor of speech ({str(error).splitlines()[0]})",
            "name a base model like Whisper, with preprocessor_config.json and its tokenizer",
        ) from error
    return processor


def window_seconds(processor: Any) -> float:
    """How long a recording the model hears at once; what is shorter is filled with silence."""
    return float(processor.feature_extractor.n_samples / processor.feature_extractor.sampling_rate)


def features(processor: Any, recordings: Sequence[Any]) -> Any:
    """Recordings at the extractor's rate as log-mel features, float32 [recordings, bands, frames]."""
    extractor, rate = processor.feature_extractor, processor.feature_extractor.sampling_rate
    # Extractors compute with PyTorch, and what training computes in (bfloat16, or a dry run's tensors without
    # numbers) holds for its thread alone: features are made in another, as they are in service.
    with ThreadPoolExecutor(1) as apart:
        made = apart.submit(extractor, list(recordings), sampling_rate=rate, return_tensors="np")
    return made.result()["input_features"]


def refuse_long(rows: Iterable[Mapping[str, Any]], processor: Any, side: str) -> None:
    """Check that each recording fits into the model's window, beyond which it would not be heard.

    Raises:
        StageStopped: some do not; says how many, and names the first.
    """
    most = window_seconds(processor)
    long = [row for row in rows if row["seconds"] > most]
    if long:
        shown = ", ".join(
            f"{row['origin']['file']}:{row['origin']['line']} ({row['seconds']:g} s)" for row in long[:_SHOWN]
        )
        raise StageStopped(
            f"{len(long)} recordings of {side} are longer than the {most:g} s that the model hears: {shown}",
            "cut them at silences, each piece with its own transcript; nothing of them is cut off silently",
        )


def probe(processor: Any) -> dict[str, Any]:
    """What a processor makes of a rising tone and of a short text, in short; stored with the model."""
    import numpy as np

    extractor = processor.feature_extractor
    at = np.arange(extractor.sampling_rate) / extractor.sampling_rate
    tone = np.sin(2 * np.pi * (200 + 1500 * at) * at).astype(np.float32)
    values = features(processor, [tone])
    places = np.linspace(0, values.size - 1, _PROBED).astype(int)
    return {
        "shape": list(values.shape),
        "values": [round(float(v), 5) for v in values.ravel()[places]],
        "rate": extractor.sampling_rate,
        "ids": list(processor.tokenizer("one two 一二").input_ids),
    }


def refuse_other(processor: Any, expected: Mapping[str, Any] | None, folder: Path) -> None:
    """Check that recordings and transcripts are prepared as they were in a model's training.

    Raises:
        TuneyardError: they are not, or the model's card does not say how they were.
    """
    if expected is None:
        raise TuneyardError(f"{folder}: its card has no probe of the preprocessing", "train the model again")
    found = probe(processor)
    apart = max(abs(a - b) for a, b in zip(found["values"], expected["values"], strict=True))
    differing = [name for name in ("shape", "rate", "ids") if found[name] != expected[name]]
    if apart > _SAME:
        differing.append(f"features (up to {apart:.3g} apart)")
    if differing:
        raise TuneyardError(
            f"{folder}: speech is not prepared as in training: {', '.join(differing)} of the probe differ",
            "restore its preprocessor and tokenizer files, or the version of transformers of the training",
        )
