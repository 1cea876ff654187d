"""What a refused run leaves: nothing, if no sample is good; else its parts, which the same command takes over and another one removes.

Only a first generation is removed, and only one that its own process marked as refused at its end: what another process still writes,
what was killed, and a dataset whose manifests were lost have no mark.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from aecore.artifact.commit import PartRecord, newest_of, read_record
from aecore.artifact.documents import read_json
from aecore.data.manifest import STEM
from aecore.errors import AecoreError
from aecore.store import Store, canonical_json

_CLAIM, _MARK = re.compile(r".*-g(\d{6})-\d{6}"), re.compile(r"(\d{6})\.refused")


def leave_refused(store: Store, claim: int, stems: Sequence[str]) -> None:
    """Remove what a refused claim wrote if none of its parts has a good sample, else mark it as refused."""
    try:
        records = [record for stem in stems if (record := read_record(store, stem)) is not None]
        if any(record.rows for record in records):
            store.put(_mark(claim), b"", role="refused")
        else:
            _remove(store, claim, records)
    except (AecoreError, FileExistsError):  # the error that refused the run counts
        return


def take_over(store: Store, claim: int) -> None:
    """Remove the mark of a claim that goes on: its parts are in use again."""
    if store.size(_mark(claim)) is not None:
        store.remove(_mark(claim))


def remove_refused(store: Store, identity: Mapping[str, Any]) -> None:  # any: plain JSON data
    """Remove the claims of other identities that were marked as refused where no generation was ever committed.

    The next one is then the first of its dataset, in number and in the names of its files.
    """
    names, wanted = store.list(), canonical_json(identity)
    if newest_of(names, STEM) is not None or "listings" not in names:
        return
    stems = [name.removesuffix(".json") for name in store.list("records")]
    for claim in [int(match[1]) for name in store.list("listings") if (match := _MARK.fullmatch(name))]:
        try:
            known = read_json(store, f"run.{claim:06d}.json")
            records = [record for stem in stems if _claim_of(stem) == claim and (record := read_record(store, stem)) is not None]
        except AecoreError:  # something is missing or damaged: it is left to its owner
            continue
        if known.get("kind") == "dataset" and canonical_json(known["identity"]) != wanted:
            _remove(store, claim, records)


def _claim_of(stem: str) -> int:
    match = _CLAIM.fullmatch(stem)
    return int(match[1]) if match else 1


def _mark(claim: int) -> str:
    return f"listings/{claim:06d}.refused"


def _listing(claim: int) -> str:
    return f"listings/{claim:06d}.parquet"


def _remove(store: Store, claim: int, records: Sequence[PartRecord]) -> None:
    """Remove records, parts, listing and claim in this order: whenever it is interrupted, the same command writes what is missing."""
    for record in records:
        store.remove(f"records/{record.part}.json")
    for record in records:
        for ref in record.files:
            store.remove(ref.name)
    store.remove(_listing(claim))
    store.remove(f"run.{claim:06d}.json")
    store.remove(_mark(claim))
