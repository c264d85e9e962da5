"""Models as a prediction needs them: config, tokenizer and card, the weights left where they are."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.shared import registered, sources
from components.shared.errors import TuneyardError
from components.shared.store import Store
from components.train.config import TrainConfig


@dataclass(frozen=True)
class Base:
    """A model without its weights.

    Args:
        folder: with its config.json and tokenizer.
        file_bytes: of its weights.
    """

    folder: Path
    file_bytes: int

    def shape(self) -> dict[str, Any]:
        """Its config.json."""
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found


def base_of(config: TrainConfig, store: Store, scratch: Path) -> Base:
    """The base model of a pipeline.

    Args:
        config: settings of train.
        store: gives the S3 client.
        scratch: a folder for its small files.

    Raises:
        TuneyardError: it cannot be had.
    """
    return weightless(config.base_model, config.revision, store, scratch)


def weightless(uri: str, revision: str, store: Store, scratch: Path) -> Base:
    """A model by its URI.

    Args:
        uri: as sources.kind_of knows them.
        revision: of a Hugging Face id.
        store: gives the S3 client.
        scratch: a folder for its small files.

    Raises:
        TuneyardError: it cannot be had.
    """
    kind = sources.kind_of(uri)
    scratch.mkdir(parents=True, exist_ok=True)
    if kind == "local":
        folder = Path(uri).expanduser().resolve()
        found = Base(folder, sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    elif kind == "hub":
        found = _of_hub(uri, revision)
    elif kind == "registered":
        version = registered.manifest(uri, store)
        small = tuple(entry for entry in version.files if not entry.path.endswith(".safetensors"))
        store.get_tree(replace(version, files=small), scratch)
        found = Base(scratch, version.size - sum(entry.size for entry in small))
    else:
        found = Base(scratch, _of_prefix(uri, store, scratch))
    if not (found.folder / "config.json").is_file():
        raise TuneyardError(f"model {uri}: no config.json there", "name the folder of a whole model")
    return found


def _of_hub(uri: str, revision: str) -> Base:
    from huggingface_hub import HfApi, snapshot_download

    commit, _ = sources.hub_contents(uri, revision, "model")
    wanted = ["*.json", "*.model", "*.txt", "*.jinja"]
    folder = Path(snapshot_download(uri, revision=commit, allow_patterns=wanted))
    info = HfApi().model_info(uri, revision=commit, files_metadata=True)
    sizes = [s.size or 0 for s in info.siblings or [] if s.rfilename.endswith(".safetensors")]
    return Base(folder, sum(sizes))


def _of_prefix(uri: str, store: Store, scratch: Path) -> int:
    """Fetch the small files of a prefix; the bytes of the weights."""
    bucket, prefix = uri.removeprefix("s3://").partition("/")[::2]
    weights = 0
    for found in store.list_prefix(uri):
        name = found["key"].removeprefix(prefix.rstrip("/") + "/")
        if name.endswith(".safetensors"):
            weights += found["size"]
        elif "/" not in name:
            store.client.download_file(bucket, found["key"], str(scratch / name))
    return weights
