"""Training recordings changed a little each time: another tempo, noise, parts that cannot be heard.

What is drawn is told by the update and the example alone, as for images (augmenting.py).
"""

from __future__ import annotations

from typing import Any

from components.train.objectives.media_config import SpeechAugmentation

# Of the stretching: 32 ms at 16 kHz, a quarter of it from one to the next.
_WINDOW_SECONDS = 0.032
_HOP = 4
# Noise is drawn between the asked ratio and one so much better.
_NOISE_SPAN_DB = 20.0


def augmented(samples: Any, rate: int, longest: int, how: SpeechAugmentation, draw: Any) -> Any:
    """A changed copy of a recording.

    Args:
        samples: float32 [samples].
        rate: samples a second.
        longest: samples that the model hears at once; stretching stays below it.
        how: by how much, at most.
        draw: numpy.random.Generator that decides.
    """
    if how.stretch:
        speed = draw.uniform(1 - how.stretch, 1 + how.stretch)
        samples = stretched(samples, max(speed, len(samples) / longest), rate)[:longest]
    if how.noise_snr_db is not None:
        ratio = draw.uniform(how.noise_snr_db, how.noise_snr_db + _NOISE_SPAN_DB)
        samples = noisy(samples, ratio, draw)
    return samples


def noisy(samples: Any, snr_db: float, draw: Any) -> Any:
    """A recording with white noise at a ratio of powers, 10 log10(signal / noise)."""
    import numpy as np

    power = float(np.mean(np.square(samples, dtype=np.float64)))
    deviation = (power / 10 ** (snr_db / 10)) ** 0.5
    return (samples + draw.normal(0.0, deviation, len(samples))).astype(np.float32)


def stretched(samples: Any, speed: float, rate: int) -> Any:
    """A recording played faster (speed > 1) or slower at the same pitch.

    A phase vocoder (Flanagan and Golden 1966, Phase Vocoder, Bell System Technical Journal 45(9)): magnitudes
    between two windows are interpolated, and each band's phase goes on at the pace it had there.

    Args:
        samples: float32 [samples].
        speed: length before over length after.
        rate: samples a second.
    """
    import numpy as np
    from scipy.signal import istft, stft

    size = max(_HOP * 2, round(_WINDOW_SECONDS * rate) // _HOP * _HOP)
    if len(samples) < size or abs(speed - 1) < 1e-6:
        return samples
    overlap = size - size // _HOP
    frames = stft(samples, nperseg=size, noverlap=overlap)[2]
    places = np.arange(0, frames.shape[1] - 1, speed)
    below = places.astype(int)
    share = places - below
    one, other = frames[:, below], frames[:, below + 1]
    magnitude = (1 - share) * np.abs(one) + share * np.abs(other)
    turns = np.angle(other) - np.angle(one)
    # Phase goes on by what the windows at each place differ, whatever their distance in the result.
    phase = np.angle(frames[:, :1]) + np.concatenate(
        [np.zeros_like(turns[:, :1]), np.cumsum(turns, axis=1)[:, :-1]], axis=1
    )
    found = istft(magnitude * np.exp(1j * phase), nperseg=size, noverlap=overlap)[1]
    wanted = round(len(samples) / speed)
    return np.pad(found, (0, max(0, wanted - len(found))))[:wanted].astype(np.float32)


def masked(features: Any, how: SpeechAugmentation, frames_per_second: float, draw: Any) -> Any:
    """Features [bands, frames] with one stretch of time and one of bands made their mean.

    SpecAugment (Park et al. 2019, arXiv:1904.08779, section 2) without its warping.
    """
    import numpy as np

    found = np.array(features)
    for axis, most in ((0, how.mask_bands), (1, round(how.mask_seconds * frames_per_second))):
        width = int(draw.integers(0, most + 1)) if most else 0
        start = int(draw.integers(0, max(1, found.shape[axis] - width)))
        where = [slice(None), slice(None)]
        where[axis] = slice(start, start + width)
        found[tuple(where)] = found.mean()
    return found
