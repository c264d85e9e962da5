from __future__ import annotations

import pytest

from components.ingest.config import IngestConfig
from components.ingest.ingest import ingest
from components.shared import jsonl
from components.shared.stage import Context

COLUMNS = {"prompt": "q", "completion": "a"}


@pytest.fixture
def run(tmp_path):
    """run(source, store=None, **settings): the stage; (Result, examples, quarantine)."""

    def go(source, store=None, **settings):
        config = IngestConfig(**{"source": str(source), "columns": COLUMNS, **settings})
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        context = Context("run", "test", "ingest", "key", store, folder / "out", folder / "work")
        context.out.mkdir(parents=True)
        result = ingest(config, {}, context)
        names = ("examples", "quarantine")
        return result, *(list(jsonl.read(context.out / name / f"{name}.jsonl")) for name in names)

    return go
