"""Pictures that an installed library ships, as files: the handwritten digits of scikit-learn."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import io
from pathlib import Path

from components.shared.errors import TuneyardError

_SIDE = 8
# Each number is how many of 4 x 4 dots were inked.
_MOST = 16


def digits(out: Path, sha256: str, count: int) -> None:
    """Write `<digit>/<number>.png`, 8 x 8 pixels of grey each.

    Args:
        out: to be made.
        sha256: that the library's file must have.
        count: pictures that must come out.

    Raises:
        TuneyardError: the library is not there or has other data.
    """
    from PIL import Image

    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise TuneyardError("scikit-learn is not installed", "install what requirements/ locks")
    raw = (Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz").read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise TuneyardError(
            f"scikit-learn's digits.csv.gz has sha256 {found}, expected {sha256}",
            "another version of scikit-learn has other data: pin it in the catalogue",
        )
    rows = [
        [int(float(cell)) for cell in row] for row in csv.reader(io.StringIO(gzip.decompress(raw).decode()))
    ]
    if len(rows) != count:
        raise TuneyardError(f"{len(rows)} digits came out, the catalogue expects {count}")
    for number, (*dots, digit) in enumerate(rows):
        target = out / str(digit) / f"{number:04}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.frombytes("L", (_SIDE, _SIDE), bytes(dot * 255 // _MOST for dot in dots))
        # Not compressed, so that the bytes are the same whatever zlib is there.
        picture.save(target, compress_level=0)
