"""Pictures, read alike wherever they are: when they come in, in training and when a model is judged."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared.errors import TuneyardError
from components.shared.media import BadMedia

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Told by content, not by name. Formats of vectors, of films and of many pages are none of these.
_FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
# 100 megapixels are 300 MB when decoded; a file of some kilobytes can claim a thousand times that.
MAX_PIXELS = 100_000_000
# A probe's numbers are of order one; another machine's arithmetic moves the sixth digit.
_SAME = 1e-3
_PROBED = 24


def decode(source: Path | bytes) -> tuple[Any, str, int]:
    """A picture as people see it: turned as its EXIF says, in RGB, 16 bits as 8, on white where transparent.

    Returns:
        The PIL image, the usual suffix of its format, and how many channels the file has.

    Raises:
        BadMedia: it cannot be read to its end, is no picture of a known format, too large or one of several.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    raw = source if isinstance(source, bytes) else source.read_bytes()
    if not raw:
        raise BadMedia("empty_file", "0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(raw), formats=tuple(_FORMATS))
            if image.width * image.height > MAX_PIXELS:
                raise BadMedia("too_large", f"{image.width} x {image.height} pixels, over {MAX_PIXELS:,}")
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise BadMedia("several_frames", f"{frames} frames: which one is meant?")
            image.load()
            turned = ImageOps.exif_transpose(image)
        except UnidentifiedImageError as error:
            seen = f"no {', '.join(_FORMATS)} file; it begins with {raw[:8]!r}"
            raise BadMedia("unknown_format", seen) from error
        except Image.DecompressionBombError as error:
            raise BadMedia("too_large", str(error)) from error
        # What PIL's decoders raise at damaged files is of many types, all meaning that.
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError) as error:
            raise BadMedia("torn_file", f"{type(error).__name__}: {error}") from error
    return _rgb(turned), _FORMATS[image.format or ""], len(image.getbands())


def _rgb(image: Any) -> Any:
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise BadMedia("unknown_format", "numbers without a range (mode F); store 8 or 16 bits a pixel")
    if image.mode.startswith("I"):
        # PIL's own conversion cuts everything above 255 off.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        seen = image.convert("RGBA")
        ground = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(ground, seen).convert("RGB")
    return image.convert("RGB")


def measured(image: Any, channels: int) -> dict[str, Any]:
    """What the row of an image says beside it (examples.MEASURED); `spread` is of brightness, 0-255."""
    import numpy as np

    pixels = hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()
    spread = float(np.asarray(image.convert("L"), dtype=np.float32).std())
    return {
        "pixels": pixels,
        "width": image.width,
        "height": image.height,
        "channels": channels,
        "spread": round(spread, 3),
    }


def open_processor(folder: Path) -> Any:
    """What turns pictures into a model's input as its base was trained: sizes, means, deviations.

    Raises:
        TuneyardError: the folder says nothing of that.
    """
    from transformers import AutoImageProcessor

    try:
        # The one backend that is always there, so that numbers do not depend on what else is installed.
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError) as error:
        raise TuneyardError(
            f"{folder}: no usable preprocessor_config.json ({str(error).splitlines()[0]})",
            "name a base model that says how its images are prepared",
        ) from error


def pixel_values(processor: Any, images: Sequence[Any]) -> Any:
    """Pictures as a NumPy array, float32 [images, channels, height, width]."""
    return processor(images=list(images), return_tensors="np")["pixel_values"]


def probe(processor: Any) -> dict[str, Any]:
    """What a processor makes of a fixed picture, in short; stored with the model."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:96, 0:128]
    picture = np.stack([rows * 2, columns * 2, (rows * columns) % 256], axis=-1).astype(np.uint8)
    values = pixel_values(processor, [Image.fromarray(picture)])
    places = np.linspace(0, values.size - 1, _PROBED).astype(int)
    return {"shape": list(values.shape), "values": [round(float(v), 5) for v in values.ravel()[places]]}


def refuse_other(processor: Any, expected: Mapping[str, Any] | None, folder: Path) -> None:
    """Check that a model's pictures are prepared as they were in its training.

    Raises:
        TuneyardError: they are not, or the model's card does not say how they were.
    """
    found = probe(processor)
    if expected is None:
        raise TuneyardError(f"{folder}: its card has no probe of the preprocessing", "train the model again")
    apart = [abs(a - b) for a, b in zip(found["values"], expected["values"], strict=True)]
    if found["shape"] != expected["shape"] or max(apart) > _SAME:
        raise TuneyardError(
            f"{folder}: pictures are not prepared as in training: a test picture becomes "
            f"{found['shape']} with numbers up to {max(apart):.3g} apart, it was {expected['shape']}",
            "restore its preprocessor_config.json, or the version of transformers of the training",
        )
