"""Training images changed a little each time, as a photographer's next picture would be.

What is drawn is told by the update and the example alone, so neither how an update is cut into micro-batches
nor an interruption changes it.
"""

from __future__ import annotations

import random
from typing import Any

from components.train.objectives.media_config import ImageAugmentation


def augmented(image: Any, how: ImageAugmentation, draw: random.Random) -> Any:
    """A changed copy of an RGB image, of the same size.

    Args:
        image: PIL image.
        how: by how much, at most.
        draw: what decides.
    """
    from PIL import Image, ImageEnhance

    size = image.size
    if how.rotate_degrees:
        angle = draw.uniform(-how.rotate_degrees, how.rotate_degrees)
        image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=_border(image))
    if how.crop:
        shares = [1 - draw.uniform(0, how.crop) for _ in size]
        width, height = (max(1.0, side * share) for side, share in zip(size, shares, strict=True))
        left, top = draw.uniform(0, size[0] - width), draw.uniform(0, size[1] - height)
        box = (left, top, left + width, top + height)
        image = image.resize(size, Image.Resampling.BILINEAR, box=box)
    if how.flip != "none" and draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if how.flip == "both" and draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if how.colour_jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + draw.uniform(-how.colour_jitter, how.colour_jitter))
    return image


def _border(image: Any) -> tuple[int, ...]:
    """The colour of the corners on average, for what comes in where an image is turned."""
    right, bottom = image.width - 1, image.height - 1
    corners = [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    return tuple(round(sum(values) / len(corners)) for values in zip(*corners, strict=True))
