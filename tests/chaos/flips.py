"""`make chaos ARGS="flips count=1000 seed=0"`: one bit of one file changes, in finished and in unfinished artefacts on a disk.

Files take turns, so each is hit about equally often, whatever its size. In a finished artefact `verify --read-data` has to notice the bit,
unless the file says the same as before (`1e-05`, `1E-05`); what reads the artefact has to refuse, or to return what was written. In one
that a kill has left, the same command has to refuse, or to make what it makes undisturbed, which `verify` then finds whole.
"""

import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from aecore.checkpoint import load_model
from aecore.errors import AecoreError, StoreError
from pipelines.cli.main import main as aepipe
from pipelines.steps.logs import log_to_handler
from pipelines.steps.show import verify
from tests.chaos.counts import count_and_seed, print_counts, turns
from tests.chaos.places import Local
from tests.chaos.rounds import Bench, Round
from tests.chaos.work import MANIFEST_ROW, WORKS, Work, difference, rows_of

KILLED_AT = {  # two points for each work: little is there, most is there
    "shard": ("record.linked", "listing.linked"),
    "train": ("metrics.linked", "checkpoint.linked:3"),
    "encode": ("part.linked", "record.linked:5"),
    "follow": ("record.linked", "listing.linked"),
    "encode-follow": ("part.linked", "record.linked:2"),
}
COLUMNS = ("flips", "noticed", "equal", "wrong", "unexplained")


def main(words: list[str]) -> int:
    """Change bits, print counts for each kind of file, and return 1 if one was neither noticed nor without effect."""
    if (asked := count_and_seed("flips", words)) is None:
        return 2
    count, seed = asked
    rng = random.Random(seed)
    base = Path(tempfile.mkdtemp(prefix="aecore-flips-"))
    try:
        (base / "data").mkdir()
        bench = Bench(base, Local(base / "data"))
        bench.prepare(WORKS)
        bench.place.copy("one/run", "right/run")
        tallies: dict[str, Counter[str]] = {}
        for number, (what, found) in enumerate((*_finished(bench, rng, count // 2), *_unfinished(bench, rng, count - count // 2))):
            tally = tallies.setdefault(what, Counter())
            tally.update(["flips", found.partition(": ")[0]])
            if ": " in found:
                print(f"flip {number} of seed {seed}: {what}: {found}", flush=True)
        every = print_counts("file", COLUMNS, dict(sorted(tallies.items())))
        return int(bool(every["wrong"] or every["unexplained"]))
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _finished(bench: Bench, rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """Yield kind of file and result of each of `count` flips in the artefacts of both states."""
    place = bench.place
    cases = [(state, name) for state in ("one", "two") for name in place.names(state)]
    for state, name in turns(rng, count, cases):
        kind = name.split("/")[1]
        url, before = place.url(f"{state}/{kind}"), Path(place.url(name)).read_bytes()
        restore = place.flip(name, rng)
        with contextlib.redirect_stderr(io.StringIO()):
            found = _of_finished(bench, state, kind, url, before, Path(place.url(name)))
        restore()
        yield f"finished {kind} {_sort(name)}", found


def _of_finished(bench: Bench, state: str, kind: str, url: str, before: bytes, path: Path) -> str:
    try:
        if not _reads_right(bench, state, kind, url):
            return f"wrong: {url} was read with a changed bit in {path}"
    except Exception as error:
        return f"unexplained: reading {url} with a changed bit in {path} raised {error!r}"
    try:
        if verify(url, read_data=True).get("report", "ok") != "ok":  # of a dataset: named, and no fault of it
            return "noticed"
    except AecoreError:
        return "noticed"
    except Exception as error:
        return f"unexplained: verify {url} with a changed bit in {path} raised {error!r}"
    return "equal" if _says_the_same(before, path.read_bytes()) else f"wrong: verify did not notice a changed bit in {path}"


def _reads_right(bench: Bench, state: str, kind: str, url: str) -> bool:
    """Return whether what reads the artefact refuses it, or gets what was written: of a run, the weights of its model."""
    try:
        if kind != "run":
            return not difference(bench.rows[state, kind], rows_of(kind, url))
        weights = load_model(url).model.state_dict()
    except AecoreError:
        return True
    right = load_model(bench.place.url("right/run")).model.state_dict()
    return weights.keys() == right.keys() and all(bool((weights[name] == right[name]).all()) for name in weights)


def _says_the_same(before: bytes, after: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return bool(json.loads(before) == json.loads(after))
    return False


def _unfinished(bench: Bench, rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """Yield kind of file and result of each of `count` flips in what killed commands have left."""
    cases = []
    for work in WORKS:
        for number, point in enumerate(KILLED_AT[work.name]):
            one = Round(bench, "killed", work, rng, f"killed-{work.name}-{number}")
            one.begin()
            with one.begun(env={"AECORE_FAULT": point}) as process:
                assert process.finish().returncode == -signal.SIGKILL, process.tail()
            before = set(bench.place.names(work.begins)) if work.begins else set()
            cases += [(one, name) for name in bench.place.names(one.out) if name.replace(one.out, work.begins or "", 1) not in before]
    for one, name in turns(rng, count, cases):
        yield f"unfinished {one.work.makes[0]} {_sort(name)}", _of_unfinished(bench, one.work, one.out, name, rng)


def _of_unfinished(bench: Bench, work: Work, killed: str, name: str, rng: random.Random) -> str:
    place, kind = bench.place, work.makes[0]
    place.copy(killed, "try")
    changed = name.replace(killed, "try", 1)
    place.flip(changed, rng)
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = aepipe(Round(bench, "try", work, rng, "try").command())
        log_to_handler(logging.NullHandler(), logging.WARNING)  # the log of the command ends with it
        if code:
            said = log.getvalue()
            explained = "Traceback" not in said and (code != StoreError.exit_code or changed in said)
            return "noticed" if explained else f"unexplained: exit status {code} after a changed bit in {changed}: {said}"
        url = place.url(f"try/{kind}")
        try:
            verify(url, read_data=True)
            read = rows_of(kind, url)
        except AecoreError:
            return "noticed"
        wrong = difference(*([row for row in rows if row[0] != MANIFEST_ROW] for rows in (bench.rows[work.ends, kind], read)))
        return f"wrong: {work.name} went on from a changed bit in {name}: {wrong}" if wrong else "equal"
    except Exception as error:
        return f"unexplained: {work.name} after a changed bit in {name} raised {error!r}"
    finally:
        place.forget("try")


def _sort(name: str) -> str:
    """Return what sort of file this is: its folder in the artefact and its ending."""
    path = Path(*Path(name).parts[2:])
    folder = path.parts[0] if len(path.parts) > 1 else path.name.partition(".")[0]
    return f"{folder} {os.path.splitext(path.name)[1]}".strip()
