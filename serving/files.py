"""Which files a model may consist of: weights and text. Nothing that runs when it is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path, PurePosixPath

from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest

_TEXT = {".json", ".txt", ".jinja"}
ALLOWED = {".safetensors", ".onnx", *_TEXT}
_MAX_HEADER_BYTES = 100 << 20


def verify_names(manifest: Manifest, where: str) -> None:
    """Check the names, before a byte is fetched.

    Raises:
        TuneyardError: a file of another type; names them all.
    """
    refused = [e.path for e in manifest.files if PurePosixPath(e.path).suffix not in ALLOWED]
    if manifest.kind != "model":
        raise TuneyardError(f"{where} is a {manifest.kind}, no model", "name the manifest of a model")
    if refused:
        raise TuneyardError(
            f"{where}: files of other types than {sorted(ALLOWED)}: {refused}",
            "save the weights as safetensors or ONNX; pickles and code are never loaded",
        )


def verify_contents(folder: Path, manifest: Manifest) -> None:
    """Check that each file is of the type its name says.

    Raises:
        TuneyardError: some are not; names them all.
    """
    faults = []
    for entry in manifest.files:
        fault = _fault(folder / entry.path)
        if fault:
            faults.append(f"{entry.path}: {fault}")
    if faults:
        raise TuneyardError(
            "the model's files are not what they say: " + "; ".join(faults), "train the model again"
        )


def _fault(path: Path) -> str:
    if path.suffix == ".safetensors":
        return _safetensors_fault(path)
    if path.suffix == ".onnx":
        with path.open("rb") as stream:
            # A ModelProto begins with field 1, ir_version, a varint.
            return "" if stream.read(1) == b"\x08" else "no ONNX model"
    try:
        text = path.read_bytes().decode()
        if path.suffix == ".json":
            json.loads(text)
    except ValueError as error:
        return f"no {path.suffix[1:]} ({type(error).__name__})"
    return "NUL bytes in a text" if "\0" in text else ""


def _safetensors_fault(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            return "no safetensors file (header length)"
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return "no safetensors file (header)"
    return "" if isinstance(header, dict) else "no safetensors file (header)"
