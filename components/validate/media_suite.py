"""What any honest corpus of pictures keeps, on what ingest measured of them; see suite.py."""

from __future__ import annotations

from components.validate.expectation import MOSTLY, Expectation

_BETWEEN = "expect_column_values_to_be_between"
# Fewer pixels a side show nothing; the handwritten digits of scikit-learn have eight.
_MIN_SIDE = 8
# A base's preparation makes a square of it: a strip keeps a quarter of what it shows, or is squeezed.
_MAX_ASPECT = 4
# Standard deviation of brightness, of 255: the noise of a scanner on an empty page is above it.
_MIN_SPREAD = 1.0


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
