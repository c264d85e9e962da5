"""MLflow's server as its pod starts it: command, settings and environment of k8s/base, in the cpu image."""

from __future__ import annotations

import shutil
import socket

import httpx
import yaml

from components.shared import digest
from tests.containers.container import answers, wait_for

FOLDER = digest.TREE_ROOT / "k8s" / "base" / "mlflow"


def pod():
    """The container of k8s/base/mlflow/server.yaml."""
    for document in yaml.safe_load_all((FOLDER / "server.yaml").read_text()):
        if document["kind"] == "Deployment":
            return document["spec"]["template"]["spec"]["containers"][0]
    raise AssertionError("no Deployment")


def test_mlflows_server_answers_and_asks_for_an_account(contain, pod_environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    said = pod()
    assert said["image"] == "tuneyard/cpu"
    arguments = [{"5000": port, "0.0.0.0": "127.0.0.1"}.get(each, each) for each in said["args"]]
    # SQLite stands in for PostgreSQL, which needs a server; that its driver loads is seen below.
    told = {each["name"]: each["value"] for each in said["env"] if "value" in each} | {
        "MLFLOW_BACKEND_STORE_URI": "sqlite:////work/mlflow.db",
        "MLFLOW_AUTH_CONFIG_PATH": "/etc/mlflow/basic_auth.ini",
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{port}",
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "a-password-of-the-tests",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-key-of-the-tests",
    }
    volumes = [mount["mountPath"].lstrip("/") for mount in said["volumeMounts"]]
    container = contain("cpu", [*said["command"], *arguments], pod_environment | told, volumes)
    shutil.copy(FOLDER / "basic_auth.ini", container.outside("/etc/mlflow"))
    settings = container.outside("/etc/mlflow/basic_auth.ini")
    lines = [
        "database_uri = sqlite:////work/auth.db" if line.startswith("database_uri") else line
        for line in settings.read_text().splitlines()
    ]
    settings.write_text("\n".join(lines) + "\n")
    container.start()
    url = f"http://127.0.0.1:{port}"
    wait_for(answers(f"{url}/health"), container, 180)
    search = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
    assert httpx.get(search, timeout=60, trust_env=False).status_code == 401
    account = ("admin", "a-password-of-the-tests")
    assert httpx.get(search, timeout=60, trust_env=False, auth=account).status_code == 200


def test_the_driver_of_postgresql_loads(contain):
    container = contain("cpu", ["python3", "-c", "import psycopg2; print(psycopg2.__libpq_version__)"])
    assert container.run(60) == 0 and int(container.said()) >= 140000
