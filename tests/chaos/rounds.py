"""A round: one command under one class of faults, then undisturbed, then compared with what the commands make without faults."""

import contextlib
import logging
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from aecore.errors import AecoreError, StoreError
from pipelines.cli.main import main
from pipelines.steps.logs import log_to_handler
from pipelines.steps.show import verify
from tests.chaos.places import Place
from tests.chaos.work import (
    MANIFEST_ROW,
    NUM_IMAGES,
    PIPELINE,
    RECIPE,
    WORKS,
    Difference,
    Rows,
    Work,
    difference,
    rows_of,
    total,
    write_images,
)
from tests.processes import AEPIPE, Started, run, started

ROOT = Path(__file__).resolve().parent.parent.parent
SETTLED_S = 4.1  # until files, and objects, whose times are whole seconds, have states: the same in every round's listings
HANG_S = 240.0  # of a command that takes some seconds where nothing else runs; the pipeline starts a server
CALLER = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE", "RAY_ADDRESS", "AECORE_FAULT")


@dataclass
class Tally:
    """Counts of one class of faults over its rounds. All but the first three must be 0."""

    rounds: int = 0
    injected: int = 0
    noticed: int = 0  # damage that a command or verify reported
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    hung: int = 0
    unexplained: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return any((self.lost, self.doubled, self.wrong, self.hung, self.unexplained))

    def count(self, found: Difference, what: str) -> None:
        """Add a difference from the reference."""
        self.lost, self.doubled, self.wrong = self.lost + found.lost, self.doubled + found.doubled, self.wrong + found.wrong
        if found:
            self.notes.append(f"{what}: {found.lost} lost, {found.doubled} doubled, {found.wrong} wrong")

    def unexpected(self, what: str) -> None:
        """Count what no rule allows."""
        self.unexplained += 1
        self.notes.append(what)

    def add(self, other: "Tally") -> None:
        """Add the counts of another one."""
        for name in ("rounds", "injected", "noticed", "lost", "doubled", "wrong", "hung", "unexplained"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Bench:
    """What all rounds of a session share: place, environment of the commands, the library of faults, reference."""

    def __init__(self, base: Path, place: Place) -> None:
        self.base, self.place = base, place
        self.library = base / "faults.so"
        self.recipe = base / "recipe.yaml"
        self.logs = base / "logs"
        self.rows: dict[tuple[str, str], Rows] = {}  # (state, kind of artefact)
        self.steps: dict[str, int] = {}  # work -> how far it gets in all, see `progress`
        self.bytes: dict[str, int] = {}  # work -> bytes that it adds
        folder = base / "data/tmp"
        folder.mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in CALLER},
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",  # a command that hangs says where, when it is aborted
            "PREFECT_HOME": str(base / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "TMPDIR": str(folder),
            **place.environment,
        }

    def prepare(self, works: Sequence[Work] = WORKS) -> None:
        """Write data, recipe and library, and run the commands without faults."""
        run(["cc", "-shared", "-fPIC", "-O1", "-o", self.library, ROOT / "tests/chaos/faults.c", "-ldl"], check=True)
        for name, count in NUM_IMAGES.items():
            write_images(self.base / f"images-{name}", count, later=name == "two")
            self.place.images(f"images-{name}", self.base / f"images-{name}")
        time.sleep(SETTLED_S)
        self.recipe.write_text(RECIPE.format(images=self.place.url("images-one")))
        self.logs.mkdir()
        for work in works:
            one = Round(self, "reference", work, random.Random(0), work.ends)
            one.begin()
            before = self.place.progress(work.ends), self.place.bytes(work.ends)
            log = self.logs / f"{work.name}.log"
            assert self.run_here(one.command(), log) == 0, log.read_text()
            self.steps[work.name] = self.place.progress(work.ends) - before[0]
            self.bytes[work.name] = self.place.bytes(work.ends) - before[1]
            for kind in work.makes:
                self.rows[work.ends, kind] = rows_of(kind, self.place.url(f"{work.ends}/{kind}"))
        parts = [work.name for work in works if work.ends == PIPELINE.ends]
        self.steps[PIPELINE.name] = sum(self.steps[name] for name in parts)
        self.bytes[PIPELINE.name] = sum(self.bytes[name] for name in parts)

    def run_here(self, words: list[str], log: Path) -> int:
        """Run a command in this process, which has imported everything; return its exit status."""
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            code = main(words)
            log_to_handler(logging.NullHandler(), logging.WARNING)  # the log of the command ends with it
        return code


class Round:
    """One round. A fault (`faults.py`) starts commands with `begun`, spoils them, and hands each of them to `ended`."""

    def __init__(self, bench: Bench, name: str, work: Work, rng: random.Random, out: str) -> None:
        self.bench, self.place, self.work, self.rng, self.out = bench, bench.place, work, rng, out
        self.tally = Tally(rounds=1)
        self.codes = frozenset({0})  # with which its commands may end under the fault that is played
        self.stack = contextlib.ExitStack()  # of what ends with the round
        self.logs = bench.logs / name
        self.said = ""  # by the command that ended last
        self._commands = self._start = 0

    def url(self, name: str) -> str:
        return str(self.bench.recipe) if name == "recipe" else self.place.url(name)

    def command(self, out: str | None = None) -> list[str]:
        """Return the words of the round's command after `aepipe`."""
        return self.work.command(self.url, out or self.out)

    def begin(self) -> None:
        """Put what the command starts from where it works."""
        if self.work.begins is not None:
            for kind in self.work.makes:
                self.place.copy(f"{self.work.begins}/{kind}", f"{self.out}/{kind}")

    @contextlib.contextmanager
    def begun(
        self, command: Sequence[str] | None = None, *, env: Mapping[str, str] | None = None, wrap: Sequence[object] = ()
    ) -> Iterator[Started]:
        """Start the round's command, or another one."""
        self._commands += 1
        self._start = self.place.progress(self.out)
        words = [*wrap, *AEPIPE, *(command or self.command())]
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{self._commands:02d}.log"
        log.write_text(f"{' '.join(map(str, words))}\n{dict(env or {})}\n")
        with started(words, env={**self.bench.environment, **(env or {})}, cwd=self.bench.base, log=log, grace_s=0) as process:
            yield process

    def status_here(self, command: list[str] | None = None) -> int:
        """Run the round's command, or another one, in this process, where nothing can interrupt it; return its exit status."""
        self._commands += 1
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{self._commands:02d}.log"
        code = self.bench.run_here(command or self.command(), log)
        self.said = log.read_text()
        if code not in self.codes:
            self.tally.unexpected(f"exit status {code} of {command or self.command()}, expected one of {sorted(self.codes)}\n{self.said}")
        return code

    def reach(self, process: Started, parts: int = 1, least: int = 0) -> bool:
        """Wait for a random moment in the first of so many parts of the command's work (`least` progress); return whether it still runs."""
        moment = self.rng.randint(least, max(self.bench.steps[self.work.name] // parts, least))
        pause_s, deadline = self.rng.uniform(0, 0.05), time.monotonic() + HANG_S
        while self.place.progress(self.out) - self._start < moment and process.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(pause_s)
        return process.process.poll() is None

    def send(self, process: Started, how: signal.Signals) -> None:
        """Send a signal; it counts as a fault if there is a process to get it."""
        if process.process.poll() is None:
            process.send(how)
            self.tally.injected += 1

    def ended(self, process: Started, *signals: signal.Signals) -> int | None:
        """Wait for the end of a command and judge its exit; None: it hung, and has been ended."""
        limit_s = HANG_S * (3 if self.work is PIPELINE else 1)
        try:
            done = process.finish(limit_s)
        except AssertionError:
            self.tally.hung += 1
            process.send(signal.SIGABRT)
            with contextlib.suppress(AssertionError):
                process.finish(10)
            self.tally.notes.append(f"still running after {limit_s:.0f} s: {process.process.args}\n{process.out[-6000:]}")
            return None
        self.said = process.out
        if done.returncode not in self.codes | {-how for how in signals}:
            self.tally.unexpected(f"exit status {done.returncode}, expected one of {sorted(self.codes)}\n{process.tail()}")
        elif "Traceback (most recent call last)" in done.stdout or "Fatal Python error" in done.stdout:
            self.tally.unexpected(f"exit status {done.returncode} with a traceback\n{process.tail()}")
        return done.returncode

    def require_named(self, code: int | None, name: str) -> None:
        """Count a refusal of the storage, which is well, unless it is that of the changed file `name`."""
        if code == StoreError.exit_code and name not in self.said:
            self.tally.unexpected(f"exit status {code} after a changed bit in {name}, which is not named\n{self.said}")

    def finish(self) -> None:
        """Run the command undisturbed; it must succeed."""
        with self.begun() as process:
            if (code := self.ended(process)) not in (0, None):
                self.tally.unexpected(f"the undisturbed command ended with {code}\n{process.tail()}")

    def problems(self) -> list[str]:
        """Return what `verify --read-data` says of the artefacts."""
        found = []
        for kind in self.work.makes:
            try:
                verify(self.place.url(f"{self.out}/{kind}"), read_data=True)
            except AecoreError as error:
                found.append(str(error))
        return found

    def difference(self, *, values_only: bool = False) -> Difference:
        """Compare the artefacts with the reference, `values_only`: but for the manifest's bytes; AecoreError if one cannot be read."""

        def compared(rows: Rows) -> Rows:
            return [row for row in rows if row[0] != MANIFEST_ROW] if values_only else rows

        rows = self.bench.rows
        found = {kind: rows_of(kind, self.place.url(f"{self.out}/{kind}")) for kind in self.work.makes}
        return total(difference(compared(rows[self.work.ends, kind]), compared(made)) for kind, made in found.items())

    def judge(self) -> None:
        """Count what is lost, doubled and wrong in the end."""
        try:
            self.tally.count(self.difference(), "after the undisturbed command")
            if problems := self.problems():
                self.tally.wrong += 1
                self.tally.notes.append("verify: " + "\n".join(problems))
        except AecoreError as error:
            self.tally.unexpected(f"what the undisturbed command made cannot be read: {error}")


class Fault(NamedTuple):
    """A class of faults: what plays it in a round, and the exit codes that commands may have because of it."""

    disturb: Callable[[Round], None]
    codes: frozenset[int]


def play(one: Round, fault: Fault) -> Tally:
    """Play a round: prepare, disturb, finish, judge. A bug of anything that runs here counts as unexplained."""
    with one.stack:
        one.codes = fault.codes
        try:
            one.begin()
            fault.disturb(one)
            one.place.quiet()
            one.finish()
            one.judge()
        except Exception:
            one.tally.unexpected(traceback.format_exc())
        finally:
            one.place.quiet()
            if one.tally.bad:
                one.place.keep(one.out, one.logs)
        if not one.tally.bad:
            one.place.forget(one.out)
            shutil.rmtree(one.logs, ignore_errors=True)
    return one.tally
