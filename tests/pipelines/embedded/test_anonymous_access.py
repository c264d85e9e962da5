"""No port of the object store serves or takes anything without the generated credentials.

Each door is tried on every socket that the process really listens on, so a port that a new release of
SeaweedFS opens is tried too.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from pipelines.embedded import seaweed
from pipelines.embedded.credentials import Credentials, load_credentials
from pipelines.embedded.platform import Platform
from pipelines.embedded.processes import service_processes
from pipelines.embedded.state import load_state

SECRET = b"the weights that nobody else may read"
PATHS = (
    "/",
    "/dir/assign",
    "/dir/status",
    "/dir/lookup?volumeId=1",
    "/vol/grow?count=1",
    "/submit",
    "/cluster/status",
    "/stats/disk",
    "/metrics",
    "/ui/index.html",
    "/debug/pprof/heap",
    "/buckets/",
    "/buckets/tuneyard/secret",
    "/tuneyard/secret",
    "/tuneyard?list-type=2",
    "/etc/iam/identity.json",
    "/.tus/",
    "/?Action=CreateUser&UserName=me",
    "/?Action=AssumeRole",
)
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
# Liveness only: they answer 200 with an empty body, and hold nothing.
LIVENESS = ("/status", "/healthz")


def listening_ports(process: psutil.Process) -> list[int]:
    found = [each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert {each.laddr.ip for each in found} == {"127.0.0.1"}, "something listens beyond this machine"
    return sorted(each.laddr.port for each in found)


def file_id(store: Path, content: bytes) -> str:
    """The file id under which a volume holds `content`: volume, key and cookie, from the volume file.

    A needle is cookie (4 bytes), key (8), size (4), data size (4), data; SeaweedFS wiki, "Components".
    """
    for volume in store.glob("data/tuneyard_*.dat"):
        position = volume.read_bytes().rfind(content)
        if position >= 0:
            with volume.open("rb") as file:
                file.seek(position - 20)
                cookie, key = struct.unpack(">IQ", file.read(12))
            return f"{volume.stem.removeprefix('tuneyard_')},{key:x}{cookie:08x}"
    raise AssertionError("the object is in no volume file")


def token(key: str, fid: str) -> str:
    """A JSON web token (HS256) as the store's own parts show it to each other."""
    parts = [{"alg": "HS256", "typ": "JWT"}, {"fid": fid, "exp": int(time.time()) + 60}]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts]
    signature = hmac.new(key.encode(), b".".join(encoded), hashlib.sha256).digest()
    return b".".join([*encoded, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of one request; status 0 when the other side closed the door instead of answering."""
    body = SECRET if method in ("POST", "PUT") else None
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def stranger() -> ssl.SSLContext:
    """TLS without a certificate of one's own, which trusts anything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def member(store: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(store / "authority.crt"))
    context.load_cert_chain(store / "node.crt", store / "node.key")
    return context


@pytest.fixture
def credentials(running: Platform) -> Credentials:
    return load_credentials(running.home)


@pytest.fixture
def secret_fid(running: Platform, s3: Any) -> str:
    s3.put_object(Bucket="tuneyard", Key="secret", Body=SECRET)
    return file_id(seaweed.store_folder(running.home), SECRET)


def test_the_store_listens_on_the_settled_ports_and_no_others(
    running: Platform, weed: Callable[[], psutil.Process]
) -> None:
    ports = load_state(running.home).ports
    expected = sorted(port for name, port in ports.items() if name not in ("serving", "ui"))
    assert listening_ports(weed()) == expected


def test_the_supervisor_listens_on_no_port(running: Platform) -> None:
    found = [process for process, name in service_processes(running.home).items() if name == "supervisor"]
    assert len(found) == 1
    assert not [each for each in found[0].net_connections("inet") if each.status == psutil.CONN_LISTEN]


def test_only_the_owner_can_open_the_unix_sockets(
    running: Platform, weed: Callable[[], psutil.Process]
) -> None:
    paths = [each.laddr for each in weed().net_connections("unix") if each.laddr]
    assert {Path(path).name for path in paths} >= {"filer.sock", "s3.sock"}
    for path in (*paths, os.path.join(load_state(running.home).runtime, "supervisor.sock")):
        assert not os.stat(path).st_mode & 0o077, path


def test_plain_http_gets_and_leaves_nothing_on_any_port(
    running: Platform, weed: Callable[[], psutil.Process], secret_fid: str, s3: Any
) -> None:
    tried = 0
    for port in listening_ports(weed()):
        for path in (*PATHS, f"/{secret_fid}"):
            for method in METHODS:
                status, body = ask(http.client.HTTPConnection("127.0.0.1", port, timeout=5), method, path)
                # 0: closed, 400: "you speak HTTP to a TLS port", 403: S3 wants a signature.
                assert status in (0, 400, 403, 405), (port, method, path, status, body[:200])
                assert SECRET not in body
                tried += 1
    assert tried == 8 * (len(PATHS) + 1) * len(METHODS)
    assert s3.get_object(Bucket="tuneyard", Key="secret")["Body"].read() == SECRET


def test_the_liveness_answers_are_empty(running: Platform) -> None:
    address = running.s3_url.removeprefix("http://")
    for path in LIVENESS:
        assert ask(http.client.HTTPConnection(address, timeout=5), "GET", path) == (200, b"")


def test_tls_without_our_certificate_gets_no_answer_on_any_port(
    weed: Callable[[], psutil.Process], secret_fid: str
) -> None:
    for port in listening_ports(weed()):
        for method, path in (("GET", f"/{secret_fid}"), ("PUT", f"/{secret_fid}"), ("GET", "/dir/assign")):
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=stranger())
            assert ask(connection, method, path) == (0, b""), (port, method, path)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_grpc_without_our_certificate_is_not_spoken_on_any_port(
    weed: Callable[[], psutil.Process], encrypted: bool
) -> None:
    """An HTTP/2 server greets with a SETTINGS frame (type 4, RFC 9113 section 3.4); nobody here does."""
    greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    context = stranger()
    context.set_alpn_protocols(["h2"])
    for port in listening_ports(weed()):
        answer = b""
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
                spoken = context.wrap_socket(raw) if encrypted else raw
                spoken.sendall(greeting)
                answer = spoken.recv(4096)
        except OSError:
            continue
        assert answer[3:4] != b"\x04", (port, answer)


def test_the_grpc_unix_sockets_want_the_certificate_too(weed: Callable[[], psutil.Process]) -> None:
    paths = [each.laddr for each in weed().net_connections("unix") if "-grpc-" in (each.laddr or "")]
    assert len(set(paths)) == 4
    for path in set(paths):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(5)
            raw.connect(path)
            with pytest.raises(OSError):  # reset or a TLS alert, by the release of OpenSSL
                spoken = stranger().wrap_socket(raw)
                spoken.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                if not spoken.recv(4096):
                    raise ConnectionResetError("closed without a word")


def test_a_volume_wants_certificate_and_token(
    running: Platform, credentials: Credentials, secret_fid: str
) -> None:
    """The positive control of the tests above: the same file id is served to who holds both."""
    port = load_state(running.home).ports["volume"]
    context = member(seaweed.store_folder(running.home))

    def get(path: str, bearer: str | None) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        return ask(
            http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context), "GET", path, headers
        )

    good = token(credentials.volume_read_key, secret_fid)
    assert get(f"/{secret_fid}", good) == (200, SECRET)
    assert get(f"/{secret_fid}", None)[0] == 401
    assert get(f"/{secret_fid}", token("guessed", secret_fid))[0] == 401


@pytest.mark.parametrize("identity", ["nobody", "wrong secret", "wrong key"])
def test_s3_refuses_every_request_without_the_generated_identity(
    running: Platform, credentials: Credentials, secret_fid: str, identity: str, s3: Any
) -> None:
    key = "TYFFFFFFFFFFFFFFFFFF" if identity == "wrong key" else credentials.s3_access_key
    outsider = boto3.client(
        "s3",
        endpoint_url=running.s3_url,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key="wrong",
        config=Config(
            signature_version=UNSIGNED if identity == "nobody" else "s3v4",
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
        ),
    )
    attempts: list[Callable[[], Any]] = [
        outsider.list_buckets,
        lambda: outsider.list_objects_v2(Bucket="tuneyard"),
        lambda: outsider.get_object(Bucket="tuneyard", Key="secret"),
        lambda: outsider.put_object(Bucket="tuneyard", Key="planted", Body=b"x"),
        lambda: outsider.create_multipart_upload(Bucket="tuneyard", Key="planted"),
        lambda: outsider.delete_object(Bucket="tuneyard", Key="secret"),
        lambda: outsider.create_bucket(Bucket="planted"),
        lambda: outsider.put_bucket_acl(Bucket="tuneyard", ACL="public-read"),
    ]
    for attempt in attempts:
        with pytest.raises(ClientError) as refused:
            attempt()
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert s3.get_object(Bucket="tuneyard", Key="secret")["Body"].read() == SECRET
    assert "planted" not in {each["Key"] for each in s3.list_objects_v2(Bucket="tuneyard")["Contents"]}


def test_telemetry_is_off(weed: Callable[[], psutil.Process]) -> None:
    assert "-master.telemetry=false" in weed().cmdline()


def test_everything_in_the_home_is_closed_to_others(running: Platform) -> None:
    assert not running.home.stat().st_mode & 0o077
    store = seaweed.store_folder(running.home)
    for path in (
        running.home / "credentials.json",
        store / "s3.json",
        store / "security.toml",
        store / "node.key",
    ):
        assert path.stat().st_mode & 0o777 == 0o600, path
    settings = (running.home / "supervisord.conf").read_text() + " ".join(
        part for process in service_processes(running.home) for part in process.cmdline()
    )
    credentials = load_credentials(running.home)
    assert credentials.s3_secret_key not in settings
    assert credentials.serving_token not in settings
    assert credentials.s3_secret_key not in repr(credentials)
