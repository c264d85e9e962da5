"""One real platform for all tests here: SeaweedFS and supervisord started once, on free ports.

The model server and MLflow's page are stood in for by ten lines of http.server, because loading either takes
longer than all these tests together; everything else is the real thing. Every test gets the platform through
`up`, so a test may kill or stop whatever it wants.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.embedded import seaweed, services
from pipelines.embedded.credentials import load_credentials
from pipelines.embedded.platform import Platform, down, up
from pipelines.embedded.processes import service_processes

STAND_IN = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in ("/healthz", "/health") else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""
# What checkouts are called in the wild: blanks, both comment signs of the supervisor's settings, a percent
# sign, a quote, letters beyond ASCII; and longer than the 107 bytes that the path of a unix socket may have.
AWKWARD = "it's 100% Recht #1 ;für " + "x" * 100


@pytest.fixture(scope="session")
def embedded_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("embedded") / AWKWARD
    folder.mkdir()
    home, program = folder / ".tuneyard", folder / "stand_in.py"
    program.write_text(STAND_IN)

    def stand_in(port: int) -> list[str]:
        return [sys.executable, str(program), str(port)]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("TUNEYARD_S3_PORT", "TUNEYARD_SERVING_PORT", "TUNEYARD_UI_PORT"):
            patch.delenv(name, raising=False)
        # A setting of the user's that would open the store's ports again, if it got through.
        patch.setenv("WEED_HTTPS_VOLUME_CA", "")
        patch.setattr(services, "CHECKOUT", folder)
        patch.setattr(services, "server_command", stand_in)
        patch.setattr(services, "ui_command", lambda platform, port: stand_in(port))
        yield home
        down(home)
        left = [process.cmdline() for process in service_processes(home)]
    assert not left, "down() left processes behind"


@pytest.fixture
def running(embedded_home: Path) -> Platform:
    """The platform, up and healthy: the first time this takes 4 s, later 0.1 s."""
    return up(embedded_home)


@pytest.fixture
def s3(running: Platform) -> Any:
    return seaweed.client(running.s3_url, load_credentials(running.home))


@pytest.fixture
def weed(running: Platform) -> Callable[[], psutil.Process]:
    """Finds the process of the object store, which changes when it is killed."""

    def find() -> psutil.Process:
        return next(process for process, name in service_processes(running.home).items() if name == "s3")

    return find
