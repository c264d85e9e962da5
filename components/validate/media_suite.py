"""What any honest corpus of pictures or recordings keeps, on what ingest measured of them; see suite.py."""

from __future__ import annotations

from components.validate.expectation import MOSTLY, Expectation

_BETWEEN = "expect_column_values_to_be_between"
# Fewer pixels a side show nothing; the handwritten digits of scikit-learn have eight.
_MIN_SIDE = 8
# A base's preparation makes a square of it: a strip keeps a quarter of what it shows, or is squeezed.
_MAX_ASPECT = 4
# Standard deviation of brightness, of 255: the noise of a scanner on an empty page is above it.
_MIN_SPREAD = 1.0
_MIN_SECONDS, _MAX_SECONDS = 0.1, 30.0
_MIN_RATE = 8000
_MIN_LEVEL_DB = -60
# Fast English is some twenty letters a second, fast Chinese seven characters.
_MAX_CHARACTERS_PER_SECOND = 40


def pictures() -> list[Expectation]:
    """Of labelled-image, beside those of its labels."""
    return [
        *(
            Expectation(
                _BETWEEN,
                {"column": side, "min_value": _MIN_SIDE},
                f"every image is at least {_MIN_SIDE} pixels in {side}",
                show=("image", "width", "height"),
            )
            for side in ("width", "height")
        ),
        Expectation(
            _BETWEEN,
            {"column": "spread", "min_value": _MIN_SPREAD, "mostly": MOSTLY},
            "no image is blank (one colour all over)",
            show=("image", "label"),
        ),
        Expectation(
            _BETWEEN,
            {"column": "aspect", "max_value": _MAX_ASPECT},
            f"no image is more than {_MAX_ASPECT} times as long as wide: making it square hides most of it",
            severity="warn",
            show=("image", "width", "height"),
        ),
        Expectation(
            "expect_column_unique_value_count_to_be_between",
            {"column": "channels", "max_value": 1},
            "all images have as many channels: a model learns a class by its colour mode where the two go "
            "together",
            severity="warn",
            show=("image", "channels"),
        ),
    ]


def recordings() -> list[Expectation]:
    """Of transcribed-audio, beside those of its texts."""
    return [
        Expectation(
            _BETWEEN,
            {"column": "seconds", "min_value": _MIN_SECONDS, "max_value": _MAX_SECONDS},
            f"every recording is {_MIN_SECONDS:g} to {_MAX_SECONDS:g} s long: what Whisper hears",
            show=("audio", "seconds", "text"),
        ),
        Expectation(
            _BETWEEN,
            {"column": "sample_rate", "min_value": _MIN_RATE},
            f"every recording has {_MIN_RATE} samples a second or more, as a telephone",
            show=("audio", "sample_rate"),
        ),
        Expectation(
            _BETWEEN,
            {"column": "level_db", "min_value": _MIN_LEVEL_DB, "mostly": MOSTLY},
            f"no recording is silent (below {_MIN_LEVEL_DB} dB of full scale)",
            show=("audio", "level_db", "text"),
        ),
        Expectation(
            _BETWEEN,
            {"column": "texts_for_audio", "max_value": 1, "mostly": MOSTLY},
            "an identical recording has one transcript, not several that contradict each other",
            show=("audio", "text"),
            together="samples",
        ),
        Expectation(
            _BETWEEN,
            {"column": "characters_per_second", "max_value": _MAX_CHARACTERS_PER_SECOND, "mostly": MOSTLY},
            f"nobody says more than {_MAX_CHARACTERS_PER_SECOND} characters a second: that is of another "
            "recording",
            show=("audio", "seconds", "text"),
        ),
        Expectation(
            "expect_column_unique_value_count_to_be_between",
            {"column": "sample_rate", "max_value": 1},
            "all recordings have one sample rate: some were resampled, and sound duller",
            severity="warn",
            show=("audio", "sample_rate"),
        ),
    ]
