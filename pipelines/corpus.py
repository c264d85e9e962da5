"""What a prediction reads of the corpus: some thousand examples, and how many there are."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.ingest.config import IngestConfig
from components.ingest.ingest import examples_of
from components.shared.errors import TuneyardError
from components.shared.store import Store
from components.split.config import SplitConfig
from components.split.split import side_of
from pipelines.spec import PipelineSpec

# Examples that are tokenised for a prediction; the longest of more are hardly longer.
_READ = 5000


@dataclass(frozen=True)
class Documents:
    """Domain text of the first of two phases.

    Args:
        rows: some of it.
        train: how many of all will be trained on.
        total: how many there are.
    """

    rows: list[dict[str, Any]]
    train: int
    total: int


def examples_to_size(
    spec: PipelineSpec, store: Store, scratch: Path
) -> tuple[list[dict[str, Any]], int, int]:
    """Some thousand examples of the corpus, how many will be trained on, and how many there are with test's.

    Args:
        spec: the pipeline.
        store: gives the S3 client.
        scratch: a folder for the files that examples name.

    Raises:
        TuneyardError: the corpus cannot be read.
    """
    rows, parts = _read(spec.ingest, store, scratch, "map its columns with ingest.columns")
    return rows, round(parts["main"] * train_share(spec)), parts.total()


def documents_to_size(spec: PipelineSpec, store: Store, scratch: Path) -> Documents | None:
    """Some thousand documents of domain text, where the pipeline has a first phase.

    Raises:
        TuneyardError: they cannot be read.
    """
    if spec.train.first is None:
        return None
    rows, parts = _read(spec.ingest.of_domain(), store, scratch, "map its column with train.first.columns")
    train, watched, _ = spec.split.ratios
    return Documents(rows, round(parts.total() * train / (train + watched)), parts.total())


def tests_among(rows: Sequence[Mapping[str, Any]], config: SplitConfig) -> list[Mapping[str, Any]]:
    """The examples that split will put into test, but for leaks; of a source with a test of its own, all.

    What it brings is not read for a prediction; its texts are taken to be as long as the others.
    """
    if config.test_source:
        return list(rows)
    return [row for row in rows if side_of(row, config, own_test=False) == "test"] or list(rows[:1])


def train_share(spec: PipelineSpec) -> float:
    """The share (0-1) of the corpus itself that is trained on."""
    train, watched, judged = spec.split.ratios
    return train / (train + watched) if spec.split.test_source else train / (train + watched + judged)


def _read(
    config: IngestConfig, store: Store, scratch: Path, todo: str
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Some of a source's rows, and how many each part of it has."""
    parts: Counter[str] = Counter()
    found = (row for row in examples_of(config, store, scratch) if _counted(row, parts))
    rows = list(itertools.islice(found, _READ))
    if not rows:
        raise TuneyardError(f"{config.source}: no row of it is an example", todo)
    for _ in found:
        pass
    return rows, parts


def _counted(row: Mapping[str, Any], parts: Counter[str]) -> bool:
    """Count a row; whether it is of the corpus itself, not of a test split beside it."""
    part = row["origin"]["part"]
    parts[part] += 1
    return bool(part == "main")
