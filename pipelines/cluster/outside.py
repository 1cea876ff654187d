"""The one place that tells a fault of the outside from a bug: every exit of `pipelines` asks it, for what has no `AecoreError` yet.

`aecore.errors.from_outside` knows storage, memory and inputs; this adds the services: Ray, Prefect's server, the job server.
A service that does not answer is another fault than one that answers with an error: the latter's status decides what helps.
"""

import os
from typing import Any

from aecore.errors import AecoreError, ClusterError, ServiceLost, from_outside

MAY_PASS = frozenset({408, 409, 425, 429})  # besides 5xx: answers to which the same request later may succeed
_OF_PREFECT = {  # for addresses below PREFECT_API_URL
    401: "set PREFECT_API_AUTH_STRING=user:password as on the server",
    403: "set PREFECT_API_AUTH_STRING=user:password as on the server, to a user who may do that",
    404: "check PREFECT_API_URL (it ends with /api), and whether that was removed from the server meanwhile",
}
_REMEDIES = {
    401: "check the address and the credentials that this service was given",
    403: "check the address and the credentials that this service was given",
    404: "check the address, and whether that was removed there meanwhile",
    409: "somebody else has just done the same there: run the same command again",
    429: "it has too much to do: wait, then run the same command again",
}
SERVICES = frozenset({"grpc", "httpcore", "httpx", "ray", "requests", "urllib3"})  # packages whose errors are those of a service


def known_error(error: Exception) -> AecoreError | None:
    """Return the typed error for an exception that a service, the storage, memory or an input caused; None for a bug.

    The error of a task that ran on a worker is judged by its cause, which Ray wraps, and one of Prefect by the request that failed.
    """
    if isinstance(error, AecoreError):
        return error
    packages = _packages(error)
    if any(kind.__name__ == "RayTaskError" for kind in type(error).__mro__):
        cause = getattr(error, "cause", None)
        if not isinstance(cause, Exception) or type(cause).__name__ == "RayError":  # that one stands for a cause that cannot be pickled
            return None
        return known_error(cause)
    what = next(iter(str(error).strip().splitlines()), "")
    if "prefect" in packages or isinstance(error, RuntimeError):  # Prefect wraps a failed request in errors of its own, or in a bare one
        if what.startswith("Found incompatible versions"):
            return ClusterError(f"the Prefect server cannot be used ({what}): install its version of Prefect here, or this one there")
        if isinstance(cause := error.__cause__, Exception) and _packages(cause) & {"httpx", "prefect"}:
            return known_error(cause)
    if "httpx" in packages:
        from httpx import HTTPStatusError

        if isinstance(error, HTTPStatusError):
            return _refusal(error)
    if packages & SERVICES or (isinstance(error, ConnectionError) and error.filename is None):
        return ServiceLost(
            f"the connection to a service failed ({type(error).__name__}{': ' if what else ''}{what}): what is finished is kept; "
            "look whether the Ray cluster and the Prefect server are well, then run the same command again"
        )
    return from_outside(error)


def _packages(error: BaseException) -> set[str]:
    return {kind.__module__.partition(".")[0] for kind in type(error).__mro__}


def _refusal(error: Any) -> ClusterError:  # any: an HTTPStatusError of httpx, which not every installation has
    """Return the error for a service that answered with an error."""
    from httpx import ResponseNotRead

    try:
        text = error.response.text
    except ResponseNotRead:  # of a streamed response, which is closed by now
        text = ""
    status, said = error.response.status_code, " ".join(text.split())[:300]
    remedies = _REMEDIES | (_OF_PREFECT if _is_prefects(error.request.url) else {})
    kind = ServiceLost if status >= 500 or status in MAY_PASS else ClusterError
    usual = "look at its log, then run the same command again" if kind is ServiceLost else "`aepipe doctor` compares the versions"
    answer = f"{status} {error.response.reason_phrase}".strip() + (f": {said}" if said else "")
    return kind(f"{error.request.url} answered {answer}; what is finished is kept: {remedies.get(status, usual)}")


def _is_prefects(url: Any) -> bool:  # any: a URL of httpx, as above
    """Return whether an address is one of the Prefect API that PREFECT_API_URL names."""
    from httpx import URL, InvalidURL

    try:
        api = URL(os.environ.get("PREFECT_API_URL", ""))  # as httpx writes addresses: the host in lower case, no default port
    except InvalidURL:
        return False
    same = (url.scheme, url.host, url.port) == (api.scheme, api.host, api.port)
    return bool(api.host) and same and f"{url.path}/".startswith(f"{api.path.rstrip('/')}/")
