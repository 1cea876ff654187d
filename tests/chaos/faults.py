"""The classes of faults: each a function of a round, which runs the round's command under faults, once or a few times."""

import errno
import functools
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from aecore.errors import AecoreError
from tests.chaos.places import Bucket, Local
from tests.chaos.rounds import Fault, Round
from tests.chaos.work import PIPELINE, difference, rows_of
from tests.processes import run

Disturb = Callable[[Round], None]
DAMAGED, NO_STORE, OTHER_FIRST, INTERRUPTED = 3, 4, 1, 130  # exit codes: see aecore.errors
FAULTS: dict[str, dict[str, Fault]] = {"local": {}, "s3": {}}  # store -> class -> fault
TWO_DAYS_S, PAGE = 2 * 86400, 4096
REPEATED = {
    "tar",
    "index",
    "record",
    "metrics",
    "weights",
    "state",
    "checkpoint",
    "part",
}  # kinds of files of which a command commits several


def fault(name: str, *stores: str, codes: Collection[int] = ()) -> Callable[[Disturb], Disturb]:
    """Register a class of faults for these stores, all by default; besides 0, commands may end with these exit codes because of it."""

    def register(function: Disturb) -> Disturb:
        for store in stores or tuple(FAULTS):
            FAULTS[store][name] = Fault(function, frozenset({0, *codes}))
        return function

    return register


@fault("SIGKILL")
def _kill(one: Round) -> None:
    kills = one.rng.randint(2, 5)
    for _ in range(kills):
        with one.begun() as process:
            one.reach(process, kills)
            one.send(process, signal.SIGKILL)
            one.ended(process, signal.SIGKILL)


@fault("kill at a commit")
def _fault_point(one: Round) -> None:
    """Kill the command where it commits a file, of a later kind each time, so that it gets there."""
    points = sorted(one.rng.sample(range(3 * len(one.work.points)), one.rng.randint(2, 4)))
    for kind, stage in (list(itertools.product(one.work.points, ("staged", "synced", "linked")))[point] for point in points):
        nth = one.rng.choice((1, 1, 2, 3)) if kind in REPEATED else 1
        with one.begun(env={"AECORE_FAULT": f"{kind}.{stage}:{nth}"}) as process:
            one.tally.injected += one.ended(process, signal.SIGKILL) == -signal.SIGKILL


@fault("SIGINT, SIGTERM", codes=[INTERRUPTED])
def _interrupt(one: Round) -> None:
    interrupts = one.rng.randint(1, 3)
    for _ in range(interrupts):
        how = one.rng.choice((signal.SIGINT, signal.SIGTERM))
        with one.begun() as process:
            one.reach(process, interrupts, 1)
            one.send(process, how)
            if one.rng.random() < 0.3:
                time.sleep(one.rng.uniform(0, 0.5))
                one.send(process, how)
            one.ended(process, how)


@fault("SIGSTOP, SIGCONT", codes=[OTHER_FIRST])
def _stop(one: Round) -> None:
    """Stop a command a few times; half the time another one does the whole work meanwhile, and the first one wakes up to it."""
    with one.begun() as process:
        for _ in range(one.rng.randint(0, 3)):
            one.reach(process, 4)
            one.send(process, signal.SIGSTOP)
            time.sleep(one.rng.uniform(0, 0.3))
            one.send(process, signal.SIGCONT)
        one.reach(process)
        one.send(process, signal.SIGSTOP)
        if one.rng.random() < 0.5:
            with one.begun() as other:
                one.ended(other)
        one.send(process, signal.SIGCONT)
        one.ended(process)


@fault("two at once", codes=[OTHER_FIRST])
def _two(one: Round) -> None:
    """Two drivers, sometimes with one killed."""
    with one.begun() as first:
        time.sleep(one.rng.choice((0.0, one.rng.uniform(0, 1))))
        with one.begun() as second:
            one.tally.injected += 1
            victim = one.rng.choice((None, None, first, second))
            if victim is not None:
                one.reach(victim)
                one.send(victim, signal.SIGKILL)
            for process in (first, second):
                one.ended(process, *((signal.SIGKILL,) if process is victim else ()))


@fault("disk full", codes=[NO_STORE])
def _full(one: Round) -> None:
    """A small disk (a file size limit where none can be mounted, and now and then): for the artefacts, or for cache and staged files."""
    shares, limited = sorted(one.rng.uniform(0.0, 0.8) for _ in range(one.rng.randint(1, 3))), one.rng.random() < 0.3
    local = isinstance(one.place, Local)
    place = one.bench.base / "data" / (one.out if local else f"small-{one.out}")
    resize = None if limited else _small_disk(one, place)
    if resize is None:
        for share in shares:
            with one.begun(wrap=["sh", "-c", 'ulimit -f "$0"; exec "$@"', 32 + int(share * 130_000) // 512]) as process:
                one.tally.injected += one.ended(process) != 0
        return
    if local:
        one.begin()  # the disk hides what was put below it
    used = sum(-(-path.stat().st_size // PAGE) * PAGE for path in place.rglob("*"))
    for share in shares:
        resize(used + PAGE + int(share * one.bench.bytes[one.work.name]))
        with one.begun(env={} if local else {"TMPDIR": str(place), "AECORE_CACHE": str(place)}) as process:
            one.tally.injected += one.ended(process) != 0
    resize(1 << 28)


def _small_disk(one: Round, place: Path) -> Callable[[int], object] | None:
    """Mount a disk at `place` until the round ends; return a function that sets its size, None if this user may not mount one."""
    place.mkdir(exist_ok=True)
    if os.geteuid() != 0 or run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", place]).returncode != 0:
        return None
    one.stack.callback(run, ["umount", "--lazy", place], check=True)
    return lambda size: run(["mount", "-o", f"remount,size={size}", place], check=True)


@fault("I/O error", codes=[NO_STORE])
def _io_error(one: Round) -> None:
    """Reads, writes, fsyncs or links below the root fail: once, for a while, or for good."""
    calls = ("read", "write", "fsync", "link") if isinstance(one.place, Local) else ("read", "write")
    count = one.bench.base / "count"
    count.write_bytes(b"")
    for call in one.rng.sample(calls, one.rng.randint(1, 2)):
        env = {
            "LD_PRELOAD": str(one.bench.library),
            "CHAOS_ROOT": str(one.bench.base / "data"),
            "CHAOS_CALL": call,
            "CHAOS_NTH": str(int(2 ** one.rng.uniform(0, 5))),
            "CHAOS_TIMES": str(one.rng.choice((1, 1, 3, 10**6))),
            "CHAOS_ERRNO": str(one.rng.choice((errno.EIO, errno.EIO, errno.ESTALE))),
            "CHAOS_COUNT": str(count),
        }
        with one.begun(env=env) as process:
            one.ended(process)
    one.tally.injected += count.stat().st_size  # calls that failed


@fault("bit flip, finished", codes=[DAMAGED])
def _flip_finished(one: Round) -> None:
    """A bit of a finished artefact changes: it is noticed by verify, by the same command or by what reads it, or it changes nothing.

    Several bits in turn; the commands run in this process, for the last one as processes of their own.
    """
    for kind in one.work.makes:
        one.place.copy(f"{one.work.ends}/{kind}", f"{one.out}/{kind}")
    names, flips = one.place.names(one.out), 24 if isinstance(one.place, Local) else 8
    for number in range(flips):
        name, here = one.rng.choice(names), number < flips - 1
        restore = one.place.flip(name, one.rng)
        one.tally.injected += 1
        try:
            noticed = bool(one.problems())
            noticed |= _status(one, None, here) != 0
            noticed |= _use_notices(one, name, f"{one.out}-use-{number}", here)
            _noticed_or_harmless(one, noticed, name)
        finally:
            restore()


def _status(one: Round, command: list[str] | None, here: bool) -> int | None:
    if here and not (command is None and one.work is PIPELINE):  # Prefect would keep the streams of the first command for its logs
        return one.status_here(command)
    with one.begun(command) as process:
        return one.ended(process)


def _use_notices(one: Round, name: str, out: str, here: bool) -> bool:
    """Encode from the changed artefact, where that can be done; return whether it refused. If it did not, its rows must be right."""
    if "run" in one.work.makes:
        model, data = f"{one.out}/run", "one/dataset"
    elif "dataset" in one.work.makes:
        model, data = "one/run", f"{one.out}/dataset"
    else:
        return False
    table, state = f"{out}/table", "one" if data == "one/dataset" else one.work.ends
    one.stack.callback(one.place.forget, out)
    if _status(one, ["encode", one.url(model), one.url(data), one.url(table), "--recipe", one.url("recipe")], here) != 0:
        return True
    found = rows_of("table", one.url(table))
    one.tally.count(difference(one.bench.rows[state, "table"], found), f"encoded from an artefact with a changed bit in {name}")
    return False


def _noticed_or_harmless(one: Round, noticed: bool, name: str) -> None:
    try:
        found = one.difference(values_only=True)  # a file whose unread bytes differ has another hash in the manifest
    except AecoreError:
        noticed = True
    else:
        if not noticed:
            one.tally.count(found, f"nobody noticed a changed bit in {name}")
    one.tally.noticed += noticed


@fault("bit flip, unfinished", codes=[DAMAGED, NO_STORE])  # the latter: a file that nothing names yet has other bytes than are made
def _flip_unfinished(one: Round) -> None:
    """A bit changes in what a killed command has left; the same command refuses, or ends with what it should make, or verify notices.

    The same is tried with other bits of a copy of what was left; but for the last one in this process.
    """
    with one.begun() as process:
        one.reach(process, least=1)
        process.send(signal.SIGKILL)
        one.ended(process, signal.SIGKILL)
    if not (names := one.place.names(one.out)):
        return
    left = f"{one.out}-left"
    one.stack.callback(one.place.forget, left)
    one.place.copy(one.out, left)
    flips = 8 if isinstance(one.place, Local) else 4
    for number in range(flips):
        name = one.rng.choice(names)
        one.place.flip(name, one.rng)
        one.tally.injected += 1
        code = _status(one, None, number < flips - 1)
        one.require_named(code, name)
        _noticed_or_harmless(one, code != 0 or bool(one.problems()), name)
        one.place.forget(one.out)
        one.place.copy(left, one.out)


@fault("gc beside, gc after a kill")
def _gc(one: Round) -> None:
    """Collect garbage while the command runs (nothing of it is a day old), or at once after it was killed."""
    _collect_beside(one, {})
    with one.begun() as process:
        one.reach(process)
        one.send(process, signal.SIGKILL)
        one.ended(process, signal.SIGKILL)
    more = one.rng.choice(((), ("--unfinished",)))
    for kind in _begun(one):
        with one.begun(["gc", one.url(f"{one.out}/{kind}"), "--older-than", "0s", *more]) as process:
            one.ended(process)
            one.tally.injected += 1


@fault("clock two days ahead", "local")
@fault("clock two days ahead", "s3", codes=[NO_STORE])  # a bucket refuses requests that are dated so (RequestTimeTooSkewed)
def _clock(one: Round) -> None:
    """Collect garbage with a clock that is two days ahead, while the command runs; sometimes the command has that clock too."""
    env = {"LD_PRELOAD": str(one.bench.library), "CHAOS_CLOCK_S": str(TWO_DAYS_S)}
    _collect_beside(one, env)


def _begun(one: Round) -> list[str]:
    """Return which of its artefacts the command has begun."""
    return [kind for kind in one.work.makes if one.place.names(f"{one.out}/{kind}")]


def _collect_beside(one: Round, env: dict[str, str]) -> None:
    own = env if isinstance(one.place, Local) and one.rng.random() < 0.3 else {}
    with one.begun(env=own) as process:
        one.reach(process, least=1)
        one.send(process, signal.SIGSTOP)  # else it is soon over
        for kind in _begun(one):
            with one.begun(["gc", one.url(f"{one.out}/{kind}"), *one.rng.choice(((), ("--unfinished",)))], env=env) as gc:
                one.ended(gc)
        if process.process.poll() is None:
            process.send(signal.SIGCONT)
        one.ended(process)


def _spoiled(one: Round, match: str, do: str, options: Callable[[random.Random], dict[str, object]]) -> None:
    """Run the command; from the first request or from a random one on the proxy spoils those that match. Once more if none did."""
    assert isinstance(one.place, Bucket)
    for _ in range(2):
        with one.begun() as process:
            if one.rng.random() < 0.5:
                one.reach(process, 2)
            one.place.proxy.add(match, do, **options(one.rng))
            one.ended(process)
        if injected := sum(bool(done) for _, done in list(one.place.proxy.log)):
            one.tally.injected += injected
            return


FAULTS["s3"] |= {
    name: Fault(functools.partial(_spoiled, match=match, do=do, options=options), frozenset({0, *codes}))
    for name, match, do, codes, options in (
        ("received bytes flipped", "^GET", "flip", [DAMAGED, NO_STORE], lambda rng: {"times": rng.randint(1, 4)}),
        ("sent bytes flipped", "^PUT", "flip_sent", [NO_STORE], lambda rng: {"times": rng.randint(1, 4)}),
        ("503", ".", "status", [NO_STORE], lambda rng: {"times": rng.choice((1, 3, 30))}),
        ("reset", ".", "reset", [NO_STORE], lambda rng: {"times": rng.choice((1, 3, 30))}),
        (
            "cut",
            "^GET",
            "cut",
            [NO_STORE],
            lambda rng: {"times": rng.randint(1, 4), "after": rng.choice((0, 1, 100, 5000)), "seconds": rng.choice((0.0, 1.0))},
        ),
        ("slow", ".", "delay", [], lambda rng: {"times": rng.randint(1, 9), "seconds": rng.uniform(0.2, 1.5)}),
        ("lost acknowledgement", "^(PUT|POST|DELETE)", "lost_ack", [], lambda rng: {"times": rng.randint(1, 4)}),
        ("sent twice", ".", "twice", [], lambda rng: {"times": rng.choice((1, 5, 100))}),
    )
}


@fault("ETag that is no MD5", "s3")
def _kms(one: Round) -> None:
    assert isinstance(one.place, Bucket)
    key = one.rng.choice(({"x-amz-server-side-encryption": "aws:kms"}, {}))
    one.place.proxy.headers.update({"etag": f'"{one.rng.getrandbits(128):032x}"', **key})
    with one.begun() as process:
        one.ended(process)
    one.tally.injected += sum(line.startswith("GET") for line, _ in list(one.place.proxy.log))
