"""What a slice found, in the store: `work/evaluate/<key>/slice-<n>-of-<m>.safetensors`, and a `.json` beside.

The document is written last and has the digest of the bytes, so a slice is done or it never was. Both go when
the evaluation has committed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from components.evaluate.slices.share import Part, Share
from components.shared import digest, s3, transfer
from components.shared.stage import Context
from components.shared.transfer import Remote

log = logging.getLogger("tuneyard.evaluate")

# Set on a cluster where slices came before: how many.
ASKED = "TUNEYARD_EVALUATE_SLICES"


def conditions() -> dict[str, str]:
    """What this machine's arithmetic depends on: results of two kinds are never put into one report."""
    from components.shared import causal

    return {"arithmetic": causal.preferred_precision("auto"), "device": causal.device().type}


def _name(share: Share, context: Context) -> str:
    return f"work/evaluate/{context.key}/{share.name}"


@s3.faults_named("storing a slice")
def keep(part: Part, share: Share, context: Context) -> None:
    """Store what a slice found."""
    from safetensors.numpy import save_file

    context.work.mkdir(parents=True, exist_ok=True)
    path = context.work / f"{share.name}.safetensors"
    save_file(part.arrays, path)
    size, sha256 = path.stat().st_size, digest.of_file(path)
    store = context.store
    name = _name(share, context)
    transfer.upload(store.client, path, Remote(store.bucket, store.key(f"{name}.safetensors"), size, sha256))
    document = {"size": size, "sha256": sha256, "facts": part.facts, "measured": part.measured}
    document["conditions"] = conditions()
    store.write_json(f"{name}.json", document | {"digest": digest.of_value(document)})


def fetch(share: Share, context: Context) -> tuple[Part | None, str]:
    """What a slice found, if it is whole and was computed as this machine computes; else None, and why not.

    Raises:
        StoreError: the store does not answer.
    """
    try:
        document = context.store.read_json(f"{_name(share, context)}.json")
    except ValueError as error:
        return None, f"its document is damaged ({error})"
    if document is None:
        return None, "it is not in the store"
    stated = document.pop("digest", "")
    if stated != digest.of_value(document):
        return None, "its document is damaged (another digest than it says)"
    theirs, ours = document["conditions"], conditions()
    if theirs != ours:
        return None, f"it was computed with {theirs}, and here it is {ours}"
    arrays, why = _arrays(document, share, context)
    return (Part(arrays, document["facts"], document["measured"]) if arrays is not None else None), why


@s3.faults_named("fetching a slice")
def _arrays(document: dict[str, Any], share: Share, context: Context) -> tuple[dict[str, Any] | None, str]:
    from botocore.exceptions import ClientError
    from safetensors.numpy import load_file

    store = context.store
    key = store.key(f"{_name(share, context)}.safetensors")
    context.work.mkdir(parents=True, exist_ok=True)
    path = context.work / f"fetched-{share.name}.safetensors"
    path.unlink(missing_ok=True)
    try:
        with path.open("a+b") as stream:
            transfer.receive(
                store.client, Remote(store.bucket, key, document["size"], document["sha256"]), stream
            )
    except transfer.NotTheseBytes as error:
        return None, f"s3://{store.bucket}/{key} is damaged ({error}, not sha256 {document['sha256'][:12]})"
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        return None, f"s3://{store.bucket}/{key} is gone"
    return dict(load_file(path)), ""


def gather(take: Callable[[Share], Part], context: Context) -> list[Part]:
    """The parts of an evaluation, by number: those that slices left, and what is missing, done here.

    One that is lost or damaged is no reason to fail: this process can compute it as well, in the same
    batches, and Kubeflow Pipelines would not start a slice again that it has seen succeed.

    Args:
        take: does a share.
        context: of the stage.
    """
    of = int(os.environ.get(ASKED, "1"))
    if of == 1:
        return [take(Share())]
    parts = []
    for share in (Share(number, of) for number in range(1, of + 1)):
        part, why = fetch(share, context)
        if part is None:
            log.warning("slice %s: %s; its share is done here", share, why)
            part = take(share)
        parts.append(part)
    return parts
