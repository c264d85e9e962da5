"""`python -m serving --host 127.0.0.1 --port 8080`: the model server."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

DRAIN_SECONDS = 30


def main() -> int:
    """Serve until SIGTERM or SIGINT, then finish what is in flight. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m serving", description="The Tuneyard model server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    import uvicorn

    from components.shared.store import Store
    from serving import app
    from serving.catalogue import Catalogue
    from serving.following import Follower

    catalogue = Catalogue(Store.from_environment)
    follower = Follower(catalogue, Store.from_environment)
    application = app.create(catalogue, os.environ.get("TUNEYARD_SERVING_TOKEN", ""), follower)
    config = uvicorn.Config(
        application,
        host=asked.host,
        port=asked.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    # uvicorn drains, then raises the signal again for whoever was there before it: for the default handler,
    # which would end a clean stop with an error code.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, frame: None)
    server = uvicorn.Server(config)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    # Not sys.exit: a model may be loading in a thread, and native code that outlives the interpreter crashes.
    os._exit(code)
