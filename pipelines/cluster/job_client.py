"""The HTTP client of a cluster's job server: its address, requests with a timeout, and errors with a remedy."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from aecore.errors import ClusterError, ConfigError
from pipelines.recipe.recipe import ClusterSpec

logger = logging.getLogger(__name__)
REQUEST_S = 20.0
_ADDRESS_LOCK = threading.Lock()


class Unreachable(ClusterError):
    """The server did not answer; a later request may succeed."""


def job_address(cluster: ClusterSpec) -> str:
    """Return the address of the job server; ConfigError if none is set, or if it is not an HTTP address."""
    names = {"cluster.address": cluster.address} | {name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    name, address = next(((name, value) for name, value in names.items() if value), (None, None))
    if name is None or address is None:
        raise ConfigError(
            "cluster.kind=job, and no address: add cluster.address=http://host:8265 (the dashboard of the head), "
            "or set RAY_API_SERVER_ADDRESS"
        )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{name}={address} is not the address of a job server: jobs go to the dashboard of the head, cluster.address=http://host:8265"
        )
    refuse_secrets(name, address, "write http://host:8265, a token goes into RAY_AUTH_TOKEN")
    return address.rstrip("/")


def refuse_secrets(name: str, url: str, instead: str) -> None:
    """ConfigError if the address of a server holds a user name, a password or a query: it is shown in logs and on pages."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None or parts.query:
        raise ConfigError(f"{name} holds a user name, a password or a query: {instead}")


def is_this_machine(host: str) -> bool:
    """Return whether `host` is this machine (only its own addresses can be bound)."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def answers(address: str) -> Iterator[None]:
    """Turn errors of requests to the server at `address` into a ClusterError."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"the job server at {address} refuses this client ({str(error).splitlines()[0]}): set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
            "or RAY_AUTH_TOKEN_PATH to the token that the head was started with"
        ) from None
    except OSError as error:  # those of `requests` are OSErrors too
        raise Unreachable(
            f"no job server answers at {address} ({_last_line(error)}): check the address, that the head runs with its dashboard "
            "(ray start --head --dashboard-host=...), and that its port can be reached from here"
        ) from error
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        kind = Unreachable if "status code 5" in str(error) else ClusterError
        raise kind(f"the job server at {address} failed: {_last_line(error)}; is it the dashboard of Ray?") from error


def connect_to_jobs(address: str) -> Any:
    """Return Ray's client of the job server with a timeout of REQUEST_S per request; create and use it within `answers`."""
    import ray
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's own client has no timeout."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **({"timeout": REQUEST_S} | options))

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it logs the end of every log
    with _ADDRESS_LOCK:  # Ray's own variables take precedence over the argument
        before = os.environ.get("RAY_API_SERVER_ADDRESS")
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        try:
            client = Client(address)
        finally:
            del os.environ["RAY_API_SERVER_ADDRESS"]
            if before is not None:
                os.environ["RAY_API_SERVER_ADDRESS"] = before
    version = client._server_ray_version
    if version != ray.__version__:
        logger.warning("%s runs Ray %s, this is %s: cluster.python must have %s", address, version, ray.__version__, version)
    return client


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1] if lines else type(error).__name__
