"""Checks and their findings; a check that hangs becomes a failed one."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from aecore.errors import AecoreError, masked
from pipelines.recipe.yaml import Tree


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check; `state` is `ok`, `warning`, `failed` or `skipped`, `remedy` what the user can do."""

    name: str
    state: str
    message: str
    remedy: str = ""
    exit_code: int = 0

    def to_dict(self) -> Tree:
        """Return plain JSON data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Check:
    """A check: `work` returns or yields findings; `error` gives the exit code of a failure, `remedy` is for an exception in `work`."""

    name: str
    work: Callable[[], "Iterator[Finding] | Finding"]
    error: type[AecoreError]
    timeout_s: float = 20.0
    remedy: str = "fix the cause, then run `aepipe doctor` again"


def ok(name: str, message: str) -> Finding:
    return Finding(name, "ok", message)


def skipped(name: str, message: str) -> Finding:
    return Finding(name, "skipped", message)


def warning(name: str, message: str, remedy: str) -> Finding:
    return Finding(name, "warning", message, remedy)


def failed(name: str, message: str, remedy: str) -> Finding:
    return Finding(name, "failed", message, remedy)


def run_checks(checks: Sequence[Check]) -> list[Finding]:
    """Run the checks one after the other; one that raises or times out is a failed one. Messages hold no secrets of URLs."""
    return [
        dataclasses.replace(
            finding, message=masked(finding.message), exit_code=check.error.exit_code if finding.state == "failed" else finding.exit_code
        )
        for check in checks
        for finding in _run(check)
    ]


def exit_code(findings: Sequence[Finding]) -> int:
    """Return the code of the first failure, 0 if there is none."""
    return next((finding.exit_code for finding in findings if finding.state == "failed"), 0)


def _run(check: Check) -> list[Finding]:
    found: list[Finding] = []
    trouble: list[Exception] = []

    def work() -> None:
        try:
            result = check.work()
            for finding in [result] if isinstance(result, Finding) else result:
                found.append(finding)
        except Exception as error:  # any: the other checks still run, and the finding names it
            trouble.append(error)

    thread = threading.Thread(target=work, daemon=True, name=f"doctor: {check.name}")
    thread.start()
    thread.join(check.timeout_s)
    if thread.is_alive():
        return [
            *found,
            failed(check.name, f"no answer within {check.timeout_s:.0f} s", "check the service or disk behind it"),
        ]
    for error in trouble:
        message = str(error) if isinstance(error, AecoreError) else f"{type(error).__name__}: {error}"
        found.append(failed(check.name, message.strip() or type(error).__name__, check.remedy))
    return found
