"""The `tuneyard` command; what each does stands in commands/."""

from __future__ import annotations

import logging
import sys
from typing import Any

import typer

from components.shared.errors import EXIT_INTERRUPTED, EXIT_USAGE, TuneyardError
from pipelines.commands import advise, images, lines, models, platform, runs, schedules, store

app = typer.Typer(
    name="tuneyard",
    help="Turn a domain corpus and a base model into a fine-tuned model, and keep it in service.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or file, 3 stopped by a gate or a data check, "
    "130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (lines, advise, runs, schedules, platform, models, images, store):
    app.add_typer(commands.app)


def main() -> None:
    """Entry point: our errors become a message and an exit code, never a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("botocore", "boto3", "urllib3", "s3transfer", "httpx", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        # Not standing alone, click hands an Exit's code back instead of ending with it.
        code = app(standalone_mode=False)
    except TuneyardError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            _usage(error)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> None:
    """Show click's own usage errors and exits as it would itself."""
    if hasattr(error, "exit_code") and not hasattr(error, "show"):
        sys.exit(error.exit_code)
    error.show()
    sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
