"""Where data and base models come from, and a fingerprint of what is there now."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.shared import digest, registered
from components.shared.errors import TuneyardError
from components.shared.store import Store, split_uri

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def kind_of(uri: str) -> str:
    """`registered`, `s3`, `local` or `hub`: models:/, an s3:// prefix, a path or glob, a Hugging Face id.

    Raises:
        TuneyardError: neither an existing path nor of the form of a Hugging Face id.
    """
    if uri.startswith(registered.SCHEME):
        return "registered"
    if uri.startswith("s3://"):
        return "s3"
    if uri.startswith(("/", "./", "../", "~")) or any(c in uri for c in "*?[") or Path(uri).exists():
        return "local"
    if _HUB_ID.fullmatch(uri):
        return "hub"
    raise TuneyardError(
        f"{uri!r} is no models:/ name, s3:// prefix, path, glob or Hugging Face id",
        "correct it in the pipeline file",
    )


def local_files(uri: str) -> list[Path]:
    """Files of a path or glob, folders walked, hidden and `_marker` files left out, sorted.

    Raises:
        TuneyardError: nothing matches.
    """
    matches = sorted(glob.glob(os.path.expanduser(uri), recursive=True))
    files: list[Path] = []
    for match in map(Path, matches):
        found = [p for p in sorted(match.rglob("*")) if p.is_file()] if match.is_dir() else [match]
        files += [p for p in found if p.name[0] not in "._"]
    if not files:
        raise TuneyardError(
            f"{uri}: no file there (looked from {Path.cwd()})", "check the path in the pipeline file"
        )
    return files


def hub_contents(repository: str, revision: str, repo_type: str) -> tuple[str, list[str]]:
    """The commit that a revision of a Hugging Face repository points at now, and the paths of its files.

    Raises:
        TuneyardError: no such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        info: Any = HfApi().repo_info(repository, revision=revision, repo_type=repo_type)
    except Exception as error:  # the client raises a dozen unrelated types, all meaning "not to be had"
        raise TuneyardError(
            f"Hugging Face {repo_type} {repository!r} at {revision!r} cannot be had "
            f"({type(error).__name__}: {error})",
            "a local path must exist or start with ./ ; else check the id, the network, HF_TOKEN",
        ) from error
    return str(info.sha), [sibling.rfilename for sibling in info.siblings or []]


def fingerprint(uri: str, store: Store, repo_type: str, revision: str = "main") -> str:
    """A digest of the content that a URI names at this moment; a model must also be one that can be used.

    Args:
        uri: models:/ name, s3:// prefix, local path or glob, or Hugging Face id.
        store: gives the S3 client.
        repo_type: `dataset` or `model`.
        revision: of a Hugging Face id.

    Raises:
        TuneyardError: nothing is there, or a model without config.json or safetensors.
    """
    kind = kind_of(uri)
    content: list[Any]
    if kind == "registered":
        version = registered.manifest(uri, store)
        content = [version.digest]
        names = [entry.path for entry in version.files]
    elif kind == "s3":
        objects = store.list_prefix(uri)
        content = [[o["key"], o["size"], o["etag"]] for o in objects]
        folder = split_uri(uri)[1].rstrip("/") + "/"
        names = [o["key"].removeprefix(folder) for o in objects]
    elif kind == "local":
        paths = local_files(uri)
        content = [[str(p), digest.of_file(p)] for p in paths]
        names = [p.name for p in paths if p.parent == Path(os.path.expanduser(uri))]
    else:
        commit, names = hub_contents(uri, revision, repo_type)
        content = [uri, commit]
    if repo_type == "model":
        _refuse_unusable(uri, names)
    return digest.of_value(content)


def _refuse_unusable(uri: str, names: Sequence[str]) -> None:
    """Refuse a base model by the paths of its files, which are known before a byte of it is fetched."""
    if "config.json" not in names:
        raise TuneyardError(
            f"base model {uri}: no config.json there", "name the folder that holds config.json"
        )
    if any("/" not in name and name.endswith(".safetensors") for name in names):
        return
    pickles = sorted(name for name in names if Path(name).suffix in _PICKLES)
    instead = f", only {', '.join(pickles[:5])}, and reading a pickle runs what is in it" if pickles else ""
    raise TuneyardError(
        f"base model {uri}: no *.safetensors file beside config.json{instead}",
        "convert its weights to safetensors on a machine that may run them (transformers' save_pretrained "
        "writes them), or name a base model that has them",
    )


def model_folder(uri: str, store: Store, revision: str = "main") -> Path:
    """A local folder with the files of a base model.

    Raises:
        TuneyardError: nothing is there, or it has no config.json or no safetensors.
    """
    kind = kind_of(uri)
    if kind == "registered":
        folder = registered.folder(uri, store)
    elif kind == "s3":
        folder = store.get_prefix(uri)
    elif kind == "local":
        folder = Path(os.path.expanduser(uri)).resolve()
    else:
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        commit, _ = hub_contents(uri, revision, "model")
        folder = Path(snapshot_download(uri, revision=commit, allow_patterns=wanted))
    _refuse_unusable(uri, [path.name for path in folder.glob("*")])
    return folder
