"""The three services of a home, and the environment in which stages and services find each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from components.shared import digest
from components.shared.errors import UsageError
from pipelines.embedded import seaweed
from pipelines.embedded.credentials import Credentials
from pipelines.embedded.private_files import write_private
from pipelines.embedded.processes import HOME_VARIABLE
from pipelines.embedded.supervisor import CHECKOUT_VARIABLE, Service

CHECKOUT = Path(__file__).resolve().parents[2]
# Each name was looked up in the sources of the release in the lock file.
TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",  # mlflow wants the word "true", huggingface_hub takes it too
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GX_ANALYTICS_ENABLED": "False",
}


@dataclass(frozen=True)
class Platform:
    """Where the services of one home answer.

    Attributes:
        home: absolute path of the folder that holds all state.
        s3_url: of the S3 server, without a trailing slash, as are the others.
        serving_url: of the model server.
        mlflow_uri: tracking and registry URI; a SQLite file, which needs no server.
    """

    home: Path
    s3_url: str
    serving_url: str
    mlflow_uri: str


def home_dir() -> Path:
    """The home of this checkout: $TUNEYARD_HOME, or `.tuneyard` in the checkout's root.

    Raises:
        UsageError: the code runs from an installed package, and nothing says where the home is.
    """
    named = os.environ.get(HOME_VARIABLE, "").strip()
    if named:
        return Path(named).expanduser().resolve()
    if (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / ".tuneyard"
    raise UsageError(
        f"{CHECKOUT} is not a checkout (it holds no pyproject.toml), so there is no place for data",
        f"set {HOME_VARIABLE} to a folder for data, credentials and logs",
    )


def platform_of(home: Path, ports: Mapping[str, int]) -> Platform:
    """The addresses of a home that uses these ports."""
    return Platform(
        home=home,
        s3_url=f"http://127.0.0.1:{ports['s3']}",
        serving_url=f"http://127.0.0.1:{ports['serving']}",
        mlflow_uri=f"sqlite:///{home / 'mlflow.db'}",
    )


def aws_settings_path(home: Path) -> Path:
    """The AWS settings file that takes the place of the user's own."""
    return home / "aws.config"


def write_aws_settings(home: Path) -> None:
    """Write the settings that every S3 client of a stage or service reads."""
    write_private(aws_settings_path(home), "[default]\ns3 =\n    addressing_style = path\n")


def stage_environment(platform: Platform, credentials: Credentials) -> dict[str, str]:
    """The variables by which a stage finds the platform, and nothing but the platform.

    The user's own AWS settings are covered up: a profile, a session token or a configured endpoint from
    the shell would otherwise break every request, or send the data to somebody's real account.
    """
    home = platform.home
    # A proxy of the shell must not see requests to this machine.
    direct = ",".join(
        filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1,localhost"])
    )
    return {
        HOME_VARIABLE: str(home),
        "TUNEYARD_STORE": "s3://tuneyard",
        "TUNEYARD_MLFLOW_ARTIFACTS": "s3://mlflow",
        "TUNEYARD_SERVING_TOKEN": credentials.serving_token,
        "AWS_ACCESS_KEY_ID": credentials.s3_access_key,
        "AWS_SECRET_ACCESS_KEY": credentials.s3_secret_key,
        "AWS_SESSION_TOKEN": "",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false",
        "AWS_REGION": seaweed.REGION,
        "AWS_DEFAULT_REGION": seaweed.REGION,  # boto3 reads this one only, other clients the other
        "AWS_PROFILE": "default",
        "AWS_CONFIG_FILE": str(aws_settings_path(home)),
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_TRACKING_URI": platform.mlflow_uri,
        "MLFLOW_REGISTRY_URI": platform.mlflow_uri,
        "NO_PROXY": direct,
        "no_proxy": direct,
        **_urls(platform),
        **TELEMETRY_OFF,
    }


def supervisor_environment(platform: Platform, credentials: Credentials) -> dict[str, str]:
    """What supervisord and all it starts inherit: the user's environment, and ours over it."""
    # WEED_* would override SeaweedFS's settings files, and with them what they close.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WEED_")}
    ours = stage_environment(platform, credentials)
    return inherited | ours | {CHECKOUT_VARIABLE: str(CHECKOUT), "PYTHONUNBUFFERED": "1"}


def server_command(port: int) -> list[str]:
    """The command line of the model server."""
    return [sys.executable, "-m", "serving", "--host", "127.0.0.1", "--port", str(port)]


def ui_command(platform: Platform, port: int) -> list[str]:
    """The command line of MLflow's page. It refuses requests whose Host is not this machine by itself."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", platform.mlflow_uri, "--default-artifact-root", "s3://mlflow"),
        *("--no-serve-artifacts", "--workers", "1"),
    ]


def services_of(platform: Platform, ports: Mapping[str, int], runtime: Path) -> list[Service]:
    """The services of a home, in the order in which they start."""
    # supervisord keeps the environment it was started with; what moves with a port goes with the command.
    urls = _urls(platform)
    checkout = f"%(ENV_{CHECKOUT_VARIABLE})s"
    return [
        Service(
            name="s3",
            command=seaweed.command(ports, runtime),
            variables=seaweed.environment(platform.home),
            folder=seaweed.store_folder(platform.home).name,
            priority=100,
            autostart=True,
            # A polite end takes 16 s, in which its filer waits for its own S3 part to hang up. Nothing is
            # gained by waiting: every answered write is with the kernel already.
            stop_seconds=2,
        ),
        Service(
            name="server",
            command=server_command(ports["serving"]),
            # Read by nobody: other code is another service, so the next `up` starts it anew.
            variables=urls | {"TUNEYARD_SERVING_CODE": digest.of_code("deploy")},
            folder=checkout,
            priority=200,
            autostart=True,
            stop_seconds=35,
        ),
        Service(
            name="ui",
            command=ui_command(platform, ports["ui"]),
            # Its background jobs (scheduled evaluations) are not used here and cost a second process.
            variables=urls | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            folder=checkout,
            priority=300,
            autostart=False,
            stop_seconds=5,
        ),
    ]


def _urls(platform: Platform) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL_S3": platform.s3_url,
        "MLFLOW_S3_ENDPOINT_URL": platform.s3_url,
        "TUNEYARD_SERVING_URL": platform.serving_url,
    }
