"""Ingest: a corpus, whatever its columns are called, becomes examples; nothing is lost on the way."""

from __future__ import annotations

import glob
import hashlib
import html
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.ingest import media
from components.ingest.config import IngestConfig
from components.ingest.fields import decided, field_value
from components.ingest.reading import Fault, Rows, data_suffix, read
from components.shared import digest, examples, jsonl, sources
from components.shared.errors import StageStopped, TuneyardError
from components.shared.media import rooted
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context, Result
from components.shared.store import Store

log = logging.getLogger("tuneyard.ingest")

# A word of a path: between separators or digits, or at an end.
_SPLIT = re.compile(r"(?<![a-z])(train|test)(?:ing)?(?![a-z])")


def to_example(
    row: Mapping[str, Any], config: IngestConfig, shelf: media.Shelf | None = None
) -> dict[str, Any] | Fault:
    """A row of the source as an example without origin, or why it cannot be one.

    Args:
        row: of the source.
        config: settings.
        shelf: where the file that it names goes; needed where the dataset type has one.
    """
    if config.winner is not None:
        found = decided(row, config.winner)
        if isinstance(found, Fault):
            return found
        row = found
    example: dict[str, Any] = {}
    original: dict[str, Any] = {}
    for name in examples.fields(config.format):
        column = config.columns.get(name, name)
        optional = name in examples.OPTIONAL.get(config.format, ()) and name not in config.columns
        if column is None:
            continue
        if column not in row:
            if optional:
                continue
            return Fault(
                "missing_field", name, f"no column {column!r}; the row has {sorted(map(str, row))[:12]}"
            )
        if optional and row[column] in (None, ""):
            continue
        if name == examples.media_field(config.format):
            assert shelf is not None  # whoever reads such a dataset type gives one
            found = shelf.take(name, row[column])
            if isinstance(found, Fault):
                return found
            example |= found
            continue
        before, after = field_value(row[column], name, config.normalise, example, original)
        if isinstance(after, Fault):
            return after
        if after == "" and not optional:
            return Fault("empty_field", name, "no text is left after normalisation")
        example[name] = after
        if after != before:
            original[name] = before
    return _identified(example, original, row, config)


def _identified(
    example: dict[str, Any], original: dict[str, Any], row: Mapping[str, Any], config: IngestConfig
) -> dict[str, Any]:
    """An example with its id, the columns that are kept, and its fields as they were."""
    example_id = hashlib.sha256(digest.canonical(media.identity(example, config.format))).hexdigest()
    extra = {column: row.get(column) for column in config.keep}
    return (
        {**example, "id": example_id}
        | ({"extra": extra} if extra else {})
        | ({"original": original} if original else {})
    )


def _files(uri: str, part: str, config: IngestConfig, store: Store) -> list[tuple[str, Path]]:
    """(name to show, local path) of each data file of a source, in a stable order."""
    kind = sources.kind_of(uri)
    if kind == "hub":
        return _hub_files(uri, part, config.revision)
    if kind == "s3":
        root = store.get_prefix(uri)
        paths = sorted(p for p in root.rglob("*") if p.is_file())
        base = uri.rstrip("/")
        named = [(base if base.endswith("/" + p.name) else f"{base}/{p.relative_to(root)}", p) for p in paths]
    else:
        named = [(str(p), p) for p in sources.local_files(uri)]
    data = [(name, path) for name, path in named if data_suffix(path)]
    field = examples.media_field(config.format)
    pictures = [(name, path) for name, path in named if field and media.is_media(path, field)]
    known = {name for name, _ in [*data, *pictures]}
    skipped = [name for name, _ in named if name not in known]
    if not data and not pictures:
        raise TuneyardError(
            f"{uri}: no data file among {skipped[:5]}", "it reads .jsonl, .csv, .tsv and .parquet files"
        )
    for name in skipped:
        log.info("ingest: %s is no data file, left out", name)
    return data or pictures


def _hub_files(uri: str, part: str, revision: str) -> list[tuple[str, Path]]:
    from huggingface_hub import snapshot_download

    commit, names = sources.hub_contents(uri, revision, "dataset")
    names = sorted(name for name in names if data_suffix(Path(name)))
    if not names:
        raise TuneyardError(f"data set {uri}: no JSONL, CSV or Parquet file in it", "convert it first")
    wanted = _of_split(uri, part, names)
    # A name in the repository is no pattern: `[` in it must mean itself.
    patterns = [glob.escape(name) for name in wanted]
    root = Path(snapshot_download(uri, repo_type="dataset", revision=commit, allow_patterns=patterns))
    return [(f"{uri}@{commit[:12]}/{name}", root / name) for name in wanted]


def _of_split(uri: str, part: str, names: Sequence[str]) -> list[str]:
    """The files of the split that is meant: train for a source, test for a test source.

    As for the hub's own loader, a word of the path tells the split (`data/train-00000-of-00001.parquet`,
    `en/test/0.jsonl`), the last if there are two. A source whose paths name no train split is taken whole.

    Raises:
        TuneyardError: a test source whose paths name a train split and no test split.
    """
    split = "test" if part == "test" else "train"
    told = {name: _SPLIT.findall(name.lower())[-1:] for name in names}
    chosen = [name for name in names if told[name] == [split]]
    if not chosen and split == "test" and ["train"] in told.values():
        raise TuneyardError(
            f"data set {uri}: no file of a test split among {list(names)[:5]}",
            "leave split.test_source out: train, eval and test are then divided by split.ratios",
        )
    if chosen and len(chosen) < len(names):
        log.info("ingest: %s: the %d files of its %s split, out of %d", uri, len(chosen), split, len(names))
    return chosen or list(names)


def _rows(config: IngestConfig, store: Store) -> Iterator[tuple[str, str, int, dict[str, Any] | Fault]]:
    """(part, file, line, row or fault) over the main source, then the test source."""
    for part, uri in (("main", config.source), ("test", config.test_source)):
        for name, path in _files(uri, part, config, store) if uri else []:
            for line, row in _rows_of(name, path, uri or "", config):
                yield part, name, line, row


def _rows_of(name: str, path: Path, source: str, config: IngestConfig) -> Rows:
    """The rows of a file; a picture that no list names is one itself."""
    field = examples.media_field(config.format)
    if field is None:
        return read(path)
    if not data_suffix(path):
        return media.by_folder(name, path, source, config)
    return media.located(read(path), config.columns.get(field) or field, path.parent)


def _page(summary: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{v}</td></tr>" for k, v in summary["by_reason"].items()
    )
    return (
        "<!doctype html><meta charset=utf-8><title>ingest</title><style>body{font:15px system-ui;margin:2em}"
        "td,th{padding:.3em 1em;border-bottom:1px solid #ddd;text-align:left}</style><h1>Ingest</h1>"
        f"<p>{summary['read']} rows read, {summary['kept']} kept, {summary['quarantined']} in quarantine.</p>"
        f"<table><tr><th>reason<th>rows</tr>{cells}</table>"
    )


@dataclass
class _Account:
    """What became of the rows read so far."""

    by_reason: Counter[str] = field(default_factory=Counter)
    by_part: Counter[str] = field(default_factory=Counter)
    normalised: Counter[str] = field(default_factory=Counter)
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    def refuse(self, part: str, file: str, line: int, fault: Fault, row: Any) -> None:
        """Put a row in quarantine."""
        raw = fault.raw or ("" if isinstance(row, Fault) else str(dict(row))[:500])
        self.by_reason[fault.reason] += 1
        place = {"file": file, "line": line, "part": part, "field": fault.field}
        what = {"reason": fault.reason, "detail": fault.detail}
        self.quarantine.append({**place, **what, "raw": raw.encode("utf-8", "backslashreplace").decode()})

    def summary(self) -> dict[str, Any]:
        """Counts that add up: read = kept + quarantined."""
        kept, refused = sum(self.by_part.values()), len(self.quarantine)
        return {
            "read": kept + refused,
            "kept": kept,
            "quarantined": refused,
            "by_reason": dict(sorted(self.by_reason.items())),
            "by_part": dict(self.by_part),
            "normalised": dict(sorted(self.normalised.items())),
        }


def _kept(
    config: IngestConfig, store: Store, account: _Account, folder: Path, domain: bool = False
) -> Iterator[dict[str, Any]]:
    """The examples of a source, files below `folder`, or of domain text; the account notes every row."""
    shelf = media.Shelf(folder)
    progress = Progress("ingest", 0, "rows")
    for part, file, line, row in _rows(config, store):
        progress.advance()
        part = "domain" if domain else part
        example = row if isinstance(row, Fault) else to_example(row, config, shelf)
        if isinstance(example, Fault):
            account.refuse(part, file, line, example, row)
            continue
        account.by_part[part] += 1
        account.normalised.update(list(example.get("original", {})))
        yield {**example, "origin": {"file": file, "line": line, "part": part}}


def _write(config: IngestConfig, path: Path, store: Store, account: _Account, domain: bool = False) -> None:
    """Write the examples of a source, or of domain text; stop where there is not one."""
    before = len(account.quarantine)
    if jsonl.write(path, _kept(config, store, account, path.parent, domain)):
        return
    refused = account.quarantine[before:]
    nothing = {"file": config.source, "line": 0, "reason": "no rows", "detail": ""}
    first = refused[0] if refused else nothing
    raise StageStopped(
        f"ingest: 0 of {len(refused)} rows of {config.source} could be kept; the first, "
        f"{first['file']}:{first['line']}: {first['reason']} ({first['detail']})",
        f"map your column names with `{'train.first' if domain else 'ingest'}.columns: {{field: column}}`",
    )


def examples_of(config: IngestConfig, store: Store, folder: Path) -> Iterator[dict[str, Any]]:
    """The examples that the stage would make, one at a time; rows that cannot be one are passed over.

    The files that they name, with paths of this machine, are put below `folder`.
    """
    return rooted(_kept(config, store, _Account(), folder), folder)


def ingest(config: IngestConfig, inputs: Mapping[str, Artifact], context: Context) -> Result:
    """Read the corpus and write `examples` and `quarantine`.

    Raises:
        TuneyardError: no data file at the source.
        StageStopped: not one row could be kept, or two columns of a file have one name.
    """
    account = _Account()
    _write(config, context.out / "examples" / "examples.jsonl", context.store, account)
    if config.domain is not None:
        documents = context.out / "examples" / examples.DOMAIN
        _write(config.of_domain(), documents, context.store, account, domain=True)
    jsonl.write(context.out / "quarantine" / "quarantine.jsonl", account.quarantine)
    summary = account.summary()
    (context.out / "quarantine" / "summary.json").write_bytes(digest.canonical(summary))
    (context.out / "page.html").write_text(_page(summary))
    source = {"dataset_type": config.format, "source": config.source, "revision": config.revision}
    return Result(
        kinds={"examples": "dataset", "quarantine": "dataset"},
        metadata={"examples": {**source, **summary}, "quarantine": summary},
        metrics={f"rows_{name}": summary[name] for name in ("read", "kept", "quarantined")},
        summary=summary,
        page=context.out / "page.html",
    )
