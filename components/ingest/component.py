"""The KFP wrapper of ingest."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Metrics, Output


@dsl.component(base_image="tuneyard/cpu:python", install_kfp_package=False)
def ingest(
    config: str,
    run: str,
    pipeline: str,
    slot: str,
    due: str,
    examples: Output[Dataset],
    quarantine: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Read a corpus, map its columns, normalise its text, put malformed rows in quarantine."""
    from components.ingest.config import IngestConfig
    from components.ingest.ingest import ingest as verb
    from components.shared.stage import execute

    outputs = {"examples": examples, "quarantine": quarantine}
    execute(verb, IngestConfig, config, (run, pipeline, slot, due), {}, outputs, page, metrics)
