"""What a refused run leaves: nothing, if no sample is good; else its parts, which the same command takes over and another one removes.

Only a first generation is removed, and only what is complete: a run that still works, or was killed, has parts without a record.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from aecore.artifact.commit import PartRecord, newest_of, read_record
from aecore.artifact.documents import read_json
from aecore.data.format.index import read_table
from aecore.data.manifest import STEM
from aecore.errors import AecoreError
from aecore.store import Store, canonical_json

_CLAIM = re.compile(r".*-g(\d{6})-\d{6}")


def remove_if_nothing_is_good(store: Store, claim: int, stems: Sequence[str]) -> None:
    """Remove what a refused claim wrote if none of its parts has a good sample."""
    try:
        records = [record for stem in stems if (record := read_record(store, stem)) is not None]
    except AecoreError:  # the error that refused the run counts
        return
    if not any(record.rows for record in records):
        _remove(store, claim, records)


def remove_refused(store: Store, identity: Mapping[str, Any]) -> None:  # any: plain JSON data
    """Remove the complete claims of other identities where no generation was ever committed: they were refused.

    The next one is then the first of its dataset, in number and in the names of its files.
    """
    names, wanted = store.list(), canonical_json(identity)
    if newest_of(names, STEM) is not None:
        return
    claims = [int(match[1]) for name in names if (match := re.fullmatch(r"run\.(\d{6})\.json", name))]
    if not claims:
        return
    stems = [name.removesuffix(".json") for name in store.list("records")]
    for claim in claims:
        known = read_json(store, f"run.{claim:06d}.json")
        if known.get("kind") != "dataset" or canonical_json(known["identity"]) == wanted:
            continue
        try:
            records = [record for stem in stems if _claim_of(stem) == claim and (record := read_record(store, stem)) is not None]
            listing = read_table(store.read(_listing(claim)), f"{store.url}/{_listing(claim)}") if store.size(_listing(claim)) else ()
        except AecoreError:  # something is missing or damaged: it is left to its owner
            continue
        if records and sum(record.detail.get("planned", 0) for record in records) == len(listing):
            _remove(store, claim, records)


def _claim_of(stem: str) -> int:
    match = _CLAIM.fullmatch(stem)
    return int(match[1]) if match else 1


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
