"""The one place that tells a fault of the outside from a bug: every exit of `pipelines` asks it, for what has no `AecoreError` yet.

`aecore.errors.from_outside` knows storage, memory and inputs; this adds the services: Ray, Prefect's server, the job server.
"""

from aecore.errors import AecoreError, ServiceLost, from_outside

SERVICES = frozenset({"grpc", "httpcore", "httpx", "ray", "requests", "urllib3"})  # packages whose errors are those of a service


def known_error(error: Exception) -> AecoreError | None:
    """Return the typed error for an exception that a service, the storage, memory or an input caused; None for a bug.

    The error of a task that ran on a worker is judged by its cause, which Ray wraps.
    """
    if isinstance(error, AecoreError):
        return error
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if any(kind.__name__ == "RayTaskError" for kind in type(error).__mro__):
        cause = getattr(error, "cause", None)
        if not isinstance(cause, Exception) or type(cause).__name__ == "RayError":  # that one stands for a cause that cannot be pickled
            return None
        return known_error(cause)
    if packages & SERVICES or (isinstance(error, ConnectionError) and error.filename is None):
        what = next(iter(str(error).strip().splitlines()), "")
        return ServiceLost(
            f"the connection to a service failed ({type(error).__name__}{': ' if what else ''}{what}): what is finished is kept; "
            "look whether the Ray cluster and the Prefect server are well, then run the same command again"
        )
    return from_outside(error)
