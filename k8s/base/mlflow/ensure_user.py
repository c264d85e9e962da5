"""Make MLflow's user of the stages, so that none of them holds the administrator's password.

Whoever makes an experiment or a registered model may change it, and all may read: the user needs no grant.
"""

from __future__ import annotations

import os
import sys

import requests

_SECONDS = 30


def main() -> int:
    """Make the user, or give the present one the password of the Secret. Returns the exit code."""
    url = os.environ["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow/users"
    administrator = os.environ["MLFLOW_AUTH_ADMIN_USERNAME"], os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
    name, password = os.environ["USER_NAME"], os.environ["USER_PASSWORD"]
    user = {"username": name, "password": password}
    answer = requests.post(f"{url}/create", json=user, auth=administrator, timeout=_SECONDS)
    done = "made"
    if answer.status_code == 400 and "RESOURCE_ALREADY_EXISTS" in answer.text:
        answer = requests.patch(f"{url}/update-password", json=user, auth=administrator, timeout=_SECONDS)
        done = "there, its password set"
    if not answer.ok:
        sys.stderr.write(f"user {name} cannot be made at {url}: {answer.status_code} {answer.text[:300]}\n")
        return 1
    sys.stdout.write(f"user {name}: {done}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
