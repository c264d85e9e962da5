"""The secrets of one home: generated once, kept in one file that only its owner may read."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from components.shared.errors import TuneyardError
from pipelines.embedded.private_files import write_private


@dataclass(frozen=True)
class Credentials:
    """What opens the services of one home; `repr` shows none of it, so no log can."""

    s3_access_key: str
    s3_secret_key: str
    serving_token: str
    volume_write_key: str
    volume_read_key: str
    filer_write_key: str
    filer_read_key: str

    def __repr__(self) -> str:
        return "Credentials(hidden)"


def credentials_path(home: Path) -> Path:
    """Where the secrets of `home` lie."""
    return home / "credentials.json"


def load_credentials(home: Path) -> Credentials:
    """Read the secrets of `home`.

    Raises:
        TuneyardError: there is no such file yet, or it is damaged.
    """
    path = credentials_path(home)
    try:
        found = json.loads(path.read_text())
        return Credentials(**{field.name: str(found[field.name]) for field in fields(Credentials)})
    except FileNotFoundError:
        raise TuneyardError(f"{path} does not exist", "run `make up`, which generates it") from None
    except (ValueError, TypeError, KeyError) as error:
        raise TuneyardError(
            f"{path} is damaged ({type(error).__name__}: {error})",
            "run `make down`, delete that file and run `make up`: secrets are new, data stays",
        ) from error


def ensure_credentials(home: Path) -> Credentials:
    """Read the secrets of `home`, generating them the first time (256 random bits, the access key 72)."""
    path = credentials_path(home)
    if path.exists():
        path.chmod(0o600)
        return load_credentials(home)
    made = Credentials(
        s3_access_key="TY" + secrets.token_hex(9).upper(),
        s3_secret_key=secrets.token_urlsafe(32),
        serving_token=secrets.token_urlsafe(32),
        volume_write_key=secrets.token_urlsafe(32),
        volume_read_key=secrets.token_urlsafe(32),
        filer_write_key=secrets.token_urlsafe(32),
        filer_read_key=secrets.token_urlsafe(32),
    )
    write_private(path, json.dumps(asdict(made), indent=2) + "\n")
    return made
