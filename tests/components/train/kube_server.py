"""A Kubernetes API on loopback, over TLS and with a token, in front of the cluster of these tests."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import re
import threading
import time

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from tests.components.train.kube_cluster import refusals

NAMESPACE = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/tuneyard-runs/trainjobs"
PODS = "/api/v1/namespaces/tuneyard-runs/pods"


def status(code, message):
    """A Status object, as the API answers what it refuses."""
    return JSONResponse({"kind": "Status", "code": code, "message": message}, code)


def application(cluster):
    app = FastAPI()

    @app.middleware("http")
    async def allowed(request: Request, call_next):
        if cluster.broken:
            cluster.broken -= 1
            return status(503, "the server is currently unable to handle the request")
        if request.headers.get("authorization") != f"Bearer {cluster.token}":
            return status(401, "Unauthorized")
        if cluster.forbidden:
            return status(403, "trainjobs is forbidden: User tuneyard-train cannot do that")
        return await call_next(request)

    @app.post(NAMESPACE)
    async def create(request: Request):
        body = await request.json()
        found = refusals(body, cluster.runtimes)
        if found:
            return status(422, "; ".join(found))
        if body["metadata"]["name"] in cluster.jobs:
            return status(409, "already exists")
        cluster.create(body)
        return JSONResponse(body, 201)

    @app.get(NAMESPACE + "/{name}")
    async def read(name: str):
        found = cluster.seen(name) if name in cluster.jobs else None
        return JSONResponse(found) if found else status(404, f'trainjobs "{name}" not found')

    @app.delete(NAMESPACE + "/{name}")
    async def delete(name: str):
        if name not in cluster.jobs:
            return status(404, f'trainjobs "{name}" not found')
        cluster.delete(name)
        return JSONResponse({"kind": "Status", "status": "Success"})

    _pods(app, cluster)
    return app


def _pods(app, cluster):
    @app.get(PODS)
    async def pods(labelSelector: str):
        wanted = re.search(r"jobset-name=([^,]+)", labelSelector)[1]
        items = [node.described(wanted) for node in cluster.nodes.get(wanted, [])]
        return JSONResponse({"kind": "PodList", "apiVersion": "v1", "items": items})

    @app.get(PODS + "/{pod}/log")
    async def logs(pod: str, container: str):
        (node,) = [n for nodes in cluster.nodes.values() for n in nodes if n.name == pod]
        assert container == "node"

        async def said():
            sent = 0
            while True:
                over = node.phase != "Running"
                for line in node.lines[sent:]:
                    sent += 1
                    yield line
                if over:
                    return
                await asyncio.sleep(0.05)

        return StreamingResponse(said(), media_type="text/plain")


def certificate(folder):
    """A key and a certificate of 127.0.0.1 that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cluster")])
    today = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))


@contextlib.contextmanager
def serving(cluster, folder):
    """Serve a cluster over TLS; yields its port. `folder` becomes what Kubernetes mounts for a token."""
    folder.mkdir(parents=True)
    certificate(folder)
    (folder / "token").write_text(cluster.token)
    (folder / "namespace").write_text("tuneyard-runs")
    config = uvicorn.Config(
        application(cluster),
        host="127.0.0.1",
        port=0,
        log_level="error",
        ssl_certfile=str(folder / "ca.crt"),
        ssl_keyfile=str(folder / "key.pem"),
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        cluster.stop()
        server.should_exit = True
        thread.join(10)
