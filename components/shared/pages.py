"""Pages: one HTML file each, from a template beside the code that fills it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def template(path: Path) -> Any:
    """A Jinja template that escapes what it is given and fails on a name that it is not given.

    Args:
        path: of the template; others in its folder can be included.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)
