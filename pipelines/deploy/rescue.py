"""Runs whose process is gone are run again: two automations on the Prefect server, and a limit that the flows keep.

A flow run says every 30 s that it lives. After `LOST_AFTER_S` without a word (its worker was killed, its machine is gone) the first
automation marks it Crashed; Prefect's worker does that itself where it outlives the run (no memory, for example). The second one
schedules what crashed once more: the same run, which goes on from what is committed. A run that is taken for dead and is not does
no harm: both write the same files, put-if-absent. `pipelines.flows.stages` gives up after three crashes in a row.
"""

from typing import Any

from pipelines.deploy.recipes import TAG
from pipelines.flows.stages import RESCUED

LOST_AFTER_S = 90  # three heartbeats (`pipelines.flows.SETTINGS`)
AGAIN_AFTER_S = 30  # Prefect's worker reports one crash twice, 6 s apart: the second would end a run that is on its way already
ENDS = ("Completed", "Failed", "Cancelled", "Cancelling", "Crashed", "Suspended", "Paused", "AwaitingRetry")
OF_OURS = {
    "match": {"prefect.resource.id": "prefect.flow-run.*"},
    "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
    "for_each": ["prefect.resource.id"],
}


def automations(lost_after_s: int = LOST_AFTER_S) -> list[dict[str, Any]]:
    """Return the automations as plain JSON, as Prefect's API takes them."""
    heartbeat = "prefect.flow-run.heartbeat"
    silence = {"type": "event", "posture": "Proactive", "after": [heartbeat], "threshold": 1, "within": lost_after_s}
    silence |= {"expect": [heartbeat, *(f"prefect.flow-run.{name}" for name in ENDS)]}
    crash = {"type": "event", "posture": "Proactive", "after": ["prefect.flow-run.Crashed"], "threshold": 1, "within": AGAIN_AFTER_S}
    crash |= {"expect": [f"prefect.flow-run.{name}" for name in ("AwaitingRetry", "Scheduled", "Pending", "Running")]}
    mark = {"type": "change-flow-run-state", "state": "CRASHED", "message": f"nothing heard from its process for {lost_after_s} s"}
    again = {"type": "change-flow-run-state", "state": "SCHEDULED", "name": "AwaitingRetry", "message": RESCUED}
    return [
        {
            "name": "aepipe: mark a run crashed when its process is gone",
            "description": "A run that says nothing any more has lost its process.",
            "trigger": silence | OF_OURS,
            "actions": [mark],
        },
        {
            "name": "aepipe: run again what crashed",
            "description": "The same run goes on from what it has committed; after three crashes in a row it fails.",
            "trigger": crash | OF_OURS,
            "actions": [again],
        },
    ]
