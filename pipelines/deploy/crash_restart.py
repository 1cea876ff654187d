"""Restarts flow runs whose process died: two automations on the Prefect server, and a limit in the flows.

A flow run sends a heartbeat every 30 s. After `LOST_AFTER_S` without one (its worker was killed, its machine is lost) the first
automation marks it Crashed; Prefect's worker does so itself where it survives the run (out of memory, for example). The second one
schedules a crashed run again: the same run, which continues from what is committed. A false alarm is harmless: both processes write
the same files, put-if-absent. `pipelines.flows.factory` gives up after three crashes in a row.

`aepipe serve` ends the runs that a power cut left behind when it starts (`end_dead_runs`): all runs of its server are on this machine.
"""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.deploy.recipes import TAG
from pipelines.flows.factory import CRASH_RESTARTED

logger = logging.getLogger(__name__)
LOST_AFTER_S = 90  # three heartbeats (`pipelines.flows.SETTINGS`)
AGAIN_AFTER_S = 30  # Prefect's worker reports one crash twice, 6 s apart: the second would end a run that has been restarted
ENDS = ("Completed", "Failed", "Cancelled", "Cancelling", "Crashed", "Suspended", "Paused", "AwaitingRetry")
OUR_FLOW_RUNS = {
    "match": {"prefect.resource.id": "prefect.flow-run.*"},
    "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
    "for_each": ["prefect.resource.id"],
}


def automations(lost_after_s: int = LOST_AFTER_S) -> list[dict[str, Any]]:
    """Return the automations as plain JSON, in the format of Prefect's API."""
    heartbeat = "prefect.flow-run.heartbeat"
    silence = {"type": "event", "posture": "Proactive", "after": [heartbeat], "threshold": 1, "within": lost_after_s}
    silence |= {"expect": [heartbeat, *(f"prefect.flow-run.{name}" for name in ENDS)]}
    crash = {"type": "event", "posture": "Proactive", "after": ["prefect.flow-run.Crashed"], "threshold": 1, "within": AGAIN_AFTER_S}
    crash |= {"expect": [f"prefect.flow-run.{name}" for name in ("AwaitingRetry", "Scheduled", "Pending", "Running")]}
    mark = {"type": "change-flow-run-state", "state": "CRASHED", "message": f"nothing heard from its process for {lost_after_s} s"}
    again = {"type": "change-flow-run-state", "state": "SCHEDULED", "name": "AwaitingRetry", "message": CRASH_RESTARTED}
    return [
        {
            "name": "aepipe: mark a run crashed when its process is gone",
            "description": "A run without heartbeats has lost its process.",
            "trigger": silence | OUR_FLOW_RUNS,
            "actions": [mark],
        },
        {
            "name": "aepipe: run again what crashed",
            "description": "The same run continues from what it has committed; after three crashes in a row it fails.",
            "trigger": crash | OUR_FLOW_RUNS,
            "actions": [again],
        },
    ]


def end_dead_runs(deployments: Sequence[str], *, served_elsewhere: bool) -> int:
    """End the runs of these deployments (`flow/name`) that have no process; return how many.

    They would stay Running forever and hold the only concurrency slot of their deployment, so that it never runs again. Only for a server
    whose runs are all on this machine. A new server has a new password: a surviving process of an old run cannot report to it. With
    `served_elsewhere` another `aepipe serve` uses the server: runs that have a process are kept, and so are pending ones.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled, Crashed

    types = [StateType.RUNNING, StateType.CANCELLING, *([] if served_elsewhere else [StateType.PENDING])]
    under_way = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)))
    ended = 0
    with get_client(sync_client=True) as client:
        for name in deployments:
            try:
                its_id = client.read_deployment_by_name(name).id
            except ObjectNotFound:
                continue
            its_runs = DeploymentFilter(id=DeploymentFilterId(any_=[its_id]))
            found = client.read_flow_runs(deployment_filter=its_runs, flow_run_filter=under_way)
            alive = run_ids_with_process() if found and served_elsewhere else set()
            for run in found:
                if str(run.id) in alive:
                    continue
                state = Cancelled if run.state is not None and run.state.is_cancelling() else Crashed
                client.set_flow_run_state(run.id, state(message="its process was gone when aepipe serve started again"), force=True)
                logger.warning("run %s of %s lost its process: marked %s", run.name, name, state.__name__.lower())
                ended += 1
    return ended


def run_ids_with_process() -> set[str]:
    """Return the ids of the flow runs that have a process of this user on this machine."""
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if not folder.name.isdigit() or b"\0prefect." not in (folder / "cmdline").read_bytes():
                continue  # the Ray of a run inherits its environment, and may outlive it
            names = dict(entry.partition(b"=")[::2] for entry in (folder / "environ").read_bytes().split(b"\0"))
            found.add(names.get(b"PREFECT__FLOW_RUN_ID", b"").decode())
    return found - {""}
