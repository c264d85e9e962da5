"""Files that only their owner may read, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def private_folder(path: Path) -> Path:
    """Create a folder that only its owner may enter, and close it when it stands open."""
    path.mkdir(parents=True, exist_ok=True)
    # chmod, not mkdir(mode=...): the umask and an older folder would both win over the mode.
    path.chmod(0o700)
    return path


def write_private(path: Path, content: str | bytes) -> bool:
    """Replace `path` by `content` in one move, readable by its owner only.

    Returns:
        Whether the file changed; a file that already holds `content` is left alone.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == data:
        path.chmod(0o600)
        return False
    # mkstemp creates with mode 0600, so the secret is at no moment readable by others.
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return True
