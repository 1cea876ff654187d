"""Ray jobs: submits one to the job server of a cluster or joins the running one, follows it, stops it.

The key of a job is a function of what it makes. Its attempts are named KEY, KEY-2, KEY-3: while one is pending or running, every
submit of that key joins it; once it has ended, the next submit takes the next name. Ray refuses a name that is taken, so of two
concurrent clients one submits and the other joins. Everything goes over HTTP: this process starts no Ray and needs only the port of
the dashboard. Requests time out after `job_client.REQUEST_S`, waits after `cluster.timeout_s`; following lasts as long as the job.
Only the variables in `session.PASSED_VARIABLES` go from this environment into a job: credentials are those of the cluster's machines.
"""

import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from aecore.errors import ClusterError, RunFailed
from pipelines.cluster.job_client import Unreachable, answers, connect_to_jobs, is_this_machine, job_address
from pipelines.cluster.session import import_environment, local_paths, passed_variables
from pipelines.cluster.tail import LogTail
from pipelines.recipe.recipe import ClusterSpec

logger = logging.getLogger(__name__)

POLL_S, LOOK_S, ASK_S = 0.2, 1.0, 3.0
STOP_S = 30  # from SIGTERM to SIGKILL, for a job whose workers have `interrupt.GRACE_S` to write a checkpoint; Ray's default is 3


class JobStopped(RunFailed):
    """A person stopped the job, so it is not retried automatically."""

    exit_code = 130


@dataclass(frozen=True)
class JobSpec:
    """A job: `python ARGUMENTS` on the head node. `urls` are the addresses that it reads and writes."""

    key: str
    arguments: tuple[str, ...]
    urls: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a job ended: Ray's status (SUCCEEDED, FAILED, STOPPED), the exit code if the command ran, and Ray's message."""

    id: str
    status: str
    exit_code: int | None
    message: str


class JobServer:
    """The job server of a cluster; ClusterError if it cannot be reached, refuses the token, or is another service."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self.address = job_address(cluster)
        self._cluster, self._host = cluster, urlsplit(self.address).hostname or ""
        with answers(self.address):
            self._client = connect_to_jobs(self.address)

    def submit(self, job: JobSpec) -> tuple[str, bool]:
        """Submit or join a job; return the id of its attempt, and whether it is new."""
        self._require_urls_fit(job)
        deadline = time.monotonic() + self._cluster.timeout_s
        while True:
            with answers(self.address):
                number, newest = max(self._attempts(job.key).items(), default=(0, None))
                if newest is not None and not newest.status.is_terminal():
                    return str(newest.submission_id), False
                name = job.key if number == 0 else f"{job.key}-{number + 1}"
                try:
                    self._client.submit_job(
                        entrypoint=self.entrypoint(job),
                        submission_id=name,
                        runtime_env={"env_vars": self.environment()},
                        metadata=dict(job.metadata),
                    )
                    return name, True
                except RuntimeError as error:
                    if "already exists" in str(error):  # another client submitted it since the look-up
                        return name, False
                    if "agent" not in str(error) or time.monotonic() > deadline:  # a head that is starting has no agent yet
                        raise
            time.sleep(LOOK_S)

    def entrypoint(self, job: JobSpec) -> str:
        """Return the command line of a job: an explicit interpreter, every argument quoted, `exec` replaces the shell."""
        python = self._cluster.python or (sys.executable if is_this_machine(self._host) else "python")
        return "exec " + shlex.join([python, *job.arguments])

    def environment(self) -> dict[str, str]:
        """Return the environment of a job: PASSED_VARIABLES, settings, and the path of our packages if the head is this machine."""
        passed = passed_variables() | {
            "PYTHONSAFEPATH": "1",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),  # Ray's process that stops a job has its environment
        }
        return passed | (import_environment() if is_this_machine(self._host) else {})

    def running(self, key: str) -> str | None:
        """Return the id of the pending or running attempt, None without one."""
        with answers(self.address):
            _, newest = max(self._attempts(key).items(), default=(0, None))
        return None if newest is None or newest.status.is_terminal() else str(newest.submission_id)

    def stop(self, job_id: str) -> str:
        """Stop a job, wait until it has ended, and return its status; a job that has ended is left alone."""
        timeout_s = self._cluster.timeout_s + STOP_S
        deadline = time.monotonic() + timeout_s
        while True:
            info = self._look(job_id)
            if info.status.is_terminal():
                return str(info.status.value)
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray job {job_id} did not stop in {timeout_s:.0f} s: look at {self.address}/#/jobs")
            with answers(self.address):
                self._client.stop_job(job_id)
            time.sleep(POLL_S)

    def follow(self, job_id: str, on_line: Callable[[str], None], stop_requested: Callable[[], bool] = lambda: False) -> Ended:
        """Pass every line that the job prints to `on_line` until it has ended; stop it when `stop_requested()` is true."""
        began = seen = asked = time.monotonic()
        with LogTail(self._client, job_id) as tail:
            while True:
                tail.deliver(on_line, LOOK_S)
                try:
                    info, seen = self._look(job_id), time.monotonic()
                except Unreachable as error:
                    if time.monotonic() - seen > self._cluster.timeout_s:
                        raise ClusterError(f"{error}; Ray job {job_id} may go on: the same command joins it again") from error
                    continue
                if info.status.is_terminal():
                    tail.deliver_rest(on_line)
                    return Ended(job_id, str(info.status.value), info.driver_exit_code, info.message or "")
                if info.status.value == "PENDING" and time.monotonic() - began > self._cluster.timeout_s:
                    with answers(self.address):
                        self._client.stop_job(job_id)  # takes effect once the job has started
                    raise ClusterError(
                        f"Ray job {job_id} waited {self._cluster.timeout_s:.0f} s for a process on the head node and was stopped: "
                        f"see what the head is doing at {self.address}, or raise cluster.timeout_s"
                    )
                if time.monotonic() - asked > ASK_S:
                    asked = time.monotonic()
                    if stop_requested():
                        self.stop(job_id)

    def log(self, job_id: str) -> str:
        """Return everything that the job has printed."""
        with answers(self.address):
            return str(self._client.get_job_logs(job_id))

    def _attempts(self, key: str) -> dict[int, Any]:
        pattern = re.compile(re.escape(key) + r"(?:-(\d+))?")
        jobs = [(job, pattern.fullmatch(job.submission_id or "")) for job in self._client.list_jobs()]
        return {int(match[1] or 1): job for job, match in jobs if match is not None}

    def _look(self, job_id: str) -> Any:
        with answers(self.address):
            try:
                return self._client.get_job_info(job_id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    raise ClusterError(
                        f"{self.address} does not know Ray job {job_id} any more (was the cluster started again?): "
                        "run the same command again to submit it anew"
                    ) from None
                raise

    def _require_urls_fit(self, job: JobSpec) -> None:
        local = local_paths(self._cluster, *job.urls)
        if local and not is_this_machine(self._host):
            raise ClusterError(
                f"{local[0]} is a path on this machine, and the job runs on {self._host}, which has its own disk: "
                "use a storage that both see (a folder that they share: name it in cluster.shared_paths)"
            )
