"""`make histories ARGS="count=500 seed=1 store=local"`: sources that live, and datasets and tables that follow them.

A history is one source of a kind (a tree of pictures, files of arrays, tars, tars that are adopted), sometimes a second one, and some
nights. In a night something happens to the source (`living.py`), then `aepipe shard` or `adopt` runs, undisturbed or with one of EVENTS,
and mostly `aepipe encode` after it. After each night

- the dataset has exactly the samples of the source, by rules of this test, and `content_sha256` is that of a fresh dataset of it (with
  `shards.removed=keep` that of a fresh one of everything that was ever seen),
- the table has the rows of a fresh table of a fresh dataset, bit for bit (not ordinal, shard and number of the class),
- no file of before was touched, and `verify --read-data` finds nothing,

and a second process (`watch.py`) has seen nothing but whole generations meanwhile. The seed decides everything but the moments of kills
and the order of what runs at once. `history=N` repeats one, `store=s3` plays on the S3 server.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aecore.artifact.commit import newest_number
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.maintenance.gc import collect_garbage
from aecore.store import _states, open_store
from aecore.table.table import LatentTable, open_table
from aecore.table.verify import verify_table
from tests.aecore.encoding import model_config, saved_run
from tests.chaos import watch
from tests.chaos.counts import print_counts
from tests.chaos.living import CLASSES, KINDS, SIDE, Options, Row, Source, picture, sha256
from tests.chaos.places import Bucket, Local, Place, place
from tests.chaos.rounds import Bench
from tests.processes import AEPIPE, Started, children, started

DEFAULTS = {"count": "100", "seed": "0", "store": "local", "history": "", "seconds": ""}
NOBODY, INTERRUPTED = 65534, 130
SETTLED_NS = 20_000_000  # as long as this kernel's clock stands still, several times over; 2 s would let most histories read all
HANG_S = 240.0
FREE, SHARE = 10, 0.1  # what may be gone
FAULTS = ("run", "tar", "index", "record", "removal", "listing", "manifest")
TABLE_FAULTS = ("run", "part", "record", "manifest")
Live = dict[str, Row]


class Wrong(AssertionError):
    """Something that must not be."""


def main(words: list[str]) -> int:
    """Play histories, print how often each thing happened; 1 if one ended with something wrong."""
    asked = dict(word.partition("=")[::2] for word in words)
    options = DEFAULTS | asked
    if asked.keys() - DEFAULTS.keys() or options["store"] not in ("local", "s3"):
        print(f"histories {' '.join(words)}: expected {' '.join(f'{name}=' for name in DEFAULTS)}", file=sys.stderr)
        return 2
    base = Path(tempfile.mkdtemp(prefix="aecore-histories-"))
    base.chmod(0o755)  # another user lists what is below it
    numbers = [int(options["history"])] if options["history"] else range(int(options["count"]))
    counts: dict[str, Counter[str]] = {}
    wrong, begun, played = 0, time.monotonic(), 0
    try:
        with place(options["store"], base) as where, _beside(options["seed"]) as beside:
            session = Session(base, where, beside, until=begun + float(options["seconds"] or "inf"))
            for number in numbers:
                if played and time.monotonic() > session.until:
                    break
                history = History(session, f"h{number:05d}", random.Random(f"{options['seed']}/{options['store']}/{number}"))
                try:
                    problem = history.play()
                except KeyboardInterrupt:
                    break
                played += 1
                for (group, name), found in history.counts.items():
                    counts.setdefault(f"{group}: {name}", Counter())["times"] += found
                if played % 50 == 0:
                    print(f"{played} histories in {time.monotonic() - begun:.0f} s, {wrong} wrong", flush=True)
                if problem:
                    wrong += 1
                    again = f'make histories ARGS="seed={options["seed"]} store={options["store"]} history={number}"'
                    print(
                        f"history {number} of seed {options['seed']}: {history.options}\n{problem}\nagain: {again}; in {base}", flush=True
                    )
        print_counts("what", ("times",), dict(sorted(counts.items())))
        seconds = time.monotonic() - begun
        print(f"{played} histories on {options['store']}, seed {options['seed']}, {seconds:.0f} s: {wrong} wrong", flush=True)
        return int(wrong > 0)
    finally:
        if not wrong:
            shutil.rmtree(base, ignore_errors=True)


@contextlib.contextmanager
def _beside(seed: str) -> Iterator[Connection]:
    """Yield the connection to the process of `watch.py`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with children(context.Process(target=watch.serve, args=(there, seed))):
        yield here


class Session:
    """What histories share: the place of what they make, the process beside them, and a model."""

    def __init__(self, base: Path, where: Place, beside: Connection, until: float = math.inf) -> None:
        self.base, self.place, self.beside = base, where, beside
        self.until = until  # no night begins after that, but the first two of the first history
        self.bench = Bench(base, where)
        self.bench.logs.mkdir()
        self.runs = {side: saved_run(base / f"run-{side}", model_config(shape=(1, side, side))) for side in (SIDE, SIDE // 2)}

    def ask(self, *what: Any) -> Any:  # any: what `watch.serve` says
        self.beside.send(what)
        return self.beside.recv()


class Known:
    """The samples that a dataset should have, origin by origin."""

    def __init__(self) -> None:
        self.live: dict[str, Live] = {}
        self.filters: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # that the manifest has
        self.drop = True

    def after(self, source: Source, accept: bool, drop: bool) -> Live:
        """Return what a run makes of the samples of an origin."""
        listed = source.rows()
        before = self.live.get(source.name, {})
        sources = {row.source for row in listed.values()}
        found = dict(listed)
        changed = (source.options.include, source.options.exclude) != self.filters
        for key, row in before.items():
            if key in listed or (row.source in sources and source.options.kind in ("folder", "adopted")):
                continue  # listed, if under another key, or gone from a tar that is
            outside = changed and source.options.kind == "folder" and not source.options.takes(row.source)
            if (outside and not accept) or (not outside and not drop):
                found[key] = row
        return found


class History:
    """One of them."""

    def __init__(self, session: Session, name: str, rng: random.Random, options: Options | None = None) -> None:
        self.session, self.place, self.name, self.rng = session, session.place, name, rng
        self.counts: Counter[tuple[str, str]] = Counter()
        self.log: list[str] = []
        self.known = Known()
        self.said = ""
        self.commands = 0
        self.stamps: dict[str, dict[str, tuple[object, ...]]] = {"dataset": {}, "table": {}}
        self.options = options or self._options()
        self.local = isinstance(self.place, Local)
        self.keeps = options is None and self.rng.random() < 0.2 and self.options.kind in ("folder", "arrays", "adopted")
        self.known.drop = not self.keeps
        self.sources = [self._source("a")]
        self.nights = 20 if self.rng.random() < 0.02 else self.rng.choice((2, 2, 3, 3, 5))
        self.young = self.rng.random() < 0.3
        self.encoding = [*self.rng.choice(([], [], ["encode.rows_per_part=8"])), *self.rng.choice(([], ["encode.sample=true"]))]
        self.logs = session.bench.logs / name
        self.logs.mkdir()
        self.logs.chmod(0o777)  # also for another user, see `_unlisted`
        self.fresh_folder = session.base / "fresh"
        self.is_fresh_made, self.fresh_one = False, None

    def _options(self) -> Options:
        rng = self.rng
        kind = rng.choice(("folder", "folder", "folder", "arrays", "tars", "adopted"))
        by = rng.choice({"folder": ["none", "hash", "folders"], "arrays": ["none", "hash", "column"]}.get(kind, ["none", "hash"]))
        bags = ""
        if kind == "folder" and rng.random() < 0.3:
            bags = rng.choice(("parent", "regex"))
        if kind == "arrays" and by != "column" and rng.random() < 0.4:
            bags = "array"
        return Options(
            kind,
            by,
            bags,
            val=0.3 if by == "hash" else 0.0,
            decode=rng.random() < 0.3,
            resize=kind != "adopted" and rng.random() < 0.2,
            max_samples=rng.choice((4, 12, 12, 100)),
        )

    def _source(self, prefix: str) -> Source:
        source = KINDS[self.options.kind](self.place, f"{self.name}/{prefix}", self.options, self.rng)
        source.begin(self.rng.choice((9, 15, 15, 36)))
        return source

    def url(self, what: str) -> str:
        return self.place.url(f"{self.name}/{what}")

    # --- the play

    def play(self) -> str:
        """Play it; return what went wrong, "" if nothing did."""
        _states.YOUNG_NS = 2 * 10**9 if self.young else SETTLED_NS
        self.session.beside.send(("watch", self.url("dataset"), self.url("table"), self.options.kind != "adopted"))
        problem = ""
        try:
            self.count("history", f"{self.options.kind} by {self.options.by}{' in bags' if self.options.bags else ''}")
            for night in range(self.nights):
                if night > 1 and time.monotonic() > self.session.until:
                    break
                self.note(f"-- night {night}")
                self._night(night)
            self._end()
        except Exception:  # a finding, or a bug of this test
            problem = traceback.format_exc()
        looks, scans, problems = self.session.ask("rest")
        self.count("reader", "looks", looks)
        self.count("reader", "scans to their end", scans)
        if not problem and problems:
            problem = "\n".join(problems)
        _states.YOUNG_NS = 2 * 10**9
        if problem:
            try:
                self.place.keep(self.name, self.session.base)
            except Exception as error:  # it would hide what it was kept for
                self.note(f"what it left could not be kept: {error}")
            return "\n".join([*self.log, *problems, problem])
        self.place.forget(self.name)
        shutil.rmtree(self.logs, ignore_errors=True)
        return ""

    def _night(self, night: int) -> None:
        source = self.rng.choice(self.sources)
        if night == 1 and self.rng.random() < 0.2:
            self.sources.append(source := self._source("b"))
            self.count("step", "second origin")
        elif night:
            self._live(source, self.rng.randint(0, 6))
        event = self.rng.choice([*["nothing"] * 4, *(name for name, (_, fits) in EVENTS.items() if fits(self, night))])
        if (
            (self.options.bags or self.options.kind == "adopted")
            and event in ("killed", "two at once", "rewritten while it is read")
            and not self.is_whole(source)
        ):
            event = "nothing"
        self.note(f"event {event}")
        self.count("event", event)
        EVENTS[event][0](self, source)
        self.check()
        if night == 0 or self.rng.random() < 0.75:
            event = self.rng.choice((*TABLE_EVENTS, *["nothing"] * 5))
            self.note(f"encode {event}")
            self.count("encode", event)
            TABLE_EVENTS[event](self, source)
            self.check_table()

    def _live(self, source: Source, count: int) -> None:
        steps = source.steps()
        for _ in range(count):
            name = self.rng.choice(list(steps))
            if steps[name]():
                self.count("step", name)
                self.note(f"{source.name} {name}")
        if not self.young:
            time.sleep(0.03)

    def _end(self) -> None:
        """Remove what nobody needs, and look at everything once more."""
        self.session.ask("rest")  # readers of old generations of a table are told that these have expired
        self.session.beside.send(("watch", self.url("dataset"), self.url("table"), self.options.kind != "adopted"))
        for what in ("dataset", "table"):
            if self.number(what):
                collect_garbage(self.url(what), older_than_s=0, unfinished=True, keep_generations=1, retention_s=0)
        self.count("event", "gc in the end")
        self.stamps = {"dataset": {}, "table": {}}
        self.check(fresh=False)
        if self.number("table"):
            self.run(self.encode())
            self.check_table()

    def number(self, what: str = "dataset") -> int:
        """Return the newest generation; 0 if there is none."""
        return newest_number(open_store(self.url(what)), what) or 0

    def note(self, text: str) -> None:
        self.log.append(f"{time.time():.3f} {text}")

    def count(self, group: str, name: str, times: int = 1) -> None:
        self.counts[group, name] += times

    # --- commands

    def shard(self, source: Source, *more: str) -> list[str]:
        """Return the words of the command that makes the dataset what the source is."""
        verb = "adopt" if self.options.kind == "adopted" else "shard"
        words = [word for word in source.arguments() if verb == "shard" or not word.startswith("source.kind=")]
        first = ["shards.removed=keep"] if self.keeps and not self.number() else []
        return [verb, source.url, self.url("dataset"), *words, *first, "cluster.num_workers=0", *more]

    def encode(self) -> list[str]:
        run = self.session.runs[SIDE // 2 if self.options.resize else SIDE]
        return ["encode", run, self.url("dataset"), self.url("table"), "encode.batch=8", "cluster.num_workers=0", *self.encoding]

    def run(self, words: list[str], *codes: int) -> int:
        """Run a command in this process; Wrong if its exit status is none of these (0 by default)."""
        self.commands += 1
        log = self.logs / f"{self.commands:02d}.log"
        code = self.session.bench.run_here(words, log)
        self.said = log.read_text()
        if code == INTERRUPTED:  # with this process
            raise KeyboardInterrupt
        if code not in (codes or (0,)):
            raise Wrong(f"exit status {code}, expected {codes or (0,)}: {' '.join(words)}\n{self.said}")
        self.note(f"{' '.join(words)}: {code}")
        return code

    @contextlib.contextmanager
    def begun(self, words: list[str], env: Mapping[str, str] | None = None) -> Iterator[Started]:
        """Start a command as a process."""
        self.commands += 1
        log = self.logs / f"{self.commands:02d}.log"
        bench = self.session.bench
        with started([*AEPIPE, *words], env={**bench.environment, **(env or {})}, cwd=bench.base, log=log, grace_s=0) as process:
            yield process

    def ended(self, process: Started, *codes: int) -> int:
        done = process.finish(HANG_S)
        if done.returncode not in codes or "Traceback (most recent call last)" in done.stdout:
            raise Wrong(f"exit status {done.returncode}, expected {codes}: {process.tail()}")
        self.note(f"{done.returncode} of a process")
        return done.returncode

    def killed(self, words: list[str], what: str, roles: tuple[str, ...]) -> None:
        """Start a command and kill it at a random moment, or at a random point of what it commits."""
        if self.rng.random() < 0.5:
            fault = f"{self.rng.choice(roles)}.{self.rng.choice(('staged', 'synced', 'linked'))}:{self.rng.choice((1, 1, 2))}"
            with self.begun(words, {"AECORE_FAULT": fault}) as process:
                code = self.ended(process, 0, -signal.SIGKILL)
            self.count("kill", f"of {words[0]} at {fault.partition(':')[0]}" if code else f"of {words[0]}: ended before")
            return
        moment, pause = self.rng.randint(0, 20), self.rng.uniform(0, 0.03)
        with self.begun(words) as process:
            first, deadline = self.place.progress(f"{self.name}/{what}"), time.monotonic() + HANG_S
            while process.process.poll() is None and time.monotonic() < deadline:
                if self.place.progress(f"{self.name}/{what}") - first >= moment:
                    break
                time.sleep(0.002)
            time.sleep(pause)
            process.send(signal.SIGKILL)
            code = self.ended(process, 0, -signal.SIGKILL)
        self.count("kill", f"of {words[0]} at some moment" if code else f"of {words[0]}: ended before")

    # --- what is expected

    def follow(self, source: Source, *more: str, accept: bool = False, drop: bool | None = None) -> None:
        """Run a command undisturbed; it may lose what it lost."""
        drop = self.known.drop if drop is None else drop
        limit = self.rng.choice((SHARE, SHARE, 1.0))
        words = self.shard(source, *more, *(["--accept-filter"] if accept else []))
        expected = self.known.after(source, accept, drop)
        stuck = self.stuck(source, expected)
        refused = None if limit == 1.0 else self.refusal(source, self.known.after(source, False, drop))  # an accepted filter is no loss
        allowed = (3,) if stuck else (0,) if refused is False or limit == 1.0 else (3,) if refused else (0, 3)
        code = self.run([*words, *([] if limit == SHARE else [f"shards.max_removed={limit}"])], *allowed)
        if code:
            self.untouched("a refused command", "dataset")  # a table may be made meanwhile
            if stuck:
                adopted = self.options.kind == "adopted"
                self.require_said("not there any more" if adopted else "gained or changed samples")
                self.count("guard", "an adopted tar that is gone" if adopted else "a bag whose samples are not all listed")
                words = [word for word in words if not word.startswith("shards.removed=")]
                self.run([*words, "shards.removed=drop", "shards.max_removed=1", "--accept-filter"])
                accept, drop = True, True
            else:
                self.require_said("would lose .*Nothing was written.*shards.max_removed=")
                self.count("guard", "too many, or a whole class, folder or split")
                self.run([*words, "shards.max_removed=1"])
        self.made(source, accept, drop)

    def made(self, source: Source, accept: bool = False, drop: bool | None = None) -> None:
        """Note that a command ended well, whose dataset is now what the source is."""
        drop = self.known.drop if drop is None else drop
        self.known.live[source.name] = self.known.after(source, accept, drop)
        self.known.drop = drop
        self.is_fresh_made = False
        recorded = open_dataset(self.url("dataset")).manifest.identity["source"]
        self.known.filters = tuple(recorded.get("include", ())), tuple(recorded.get("exclude", ()))

    def stuck(self, source: Source, expected: Live) -> bool:
        """Return whether a bag is to be written whole of which some samples are kept that are not listed, or an adopted tar is gone."""
        listed, before = source.rows(), self.known.live.get(source.name, {})
        kept = {row.group for key, row in expected.items() if key not in listed}
        touched = {row.group for key, row in listed.items() if key not in before or row.place() != before[key].place()}
        tars = {row.source for row in expected.values()} - source.files.keys() if self.options.kind == "adopted" else set()
        return bool(tars or (self.options.bags and (kept & touched) - {""}))

    def is_whole(self, source: Source) -> bool:
        """Return whether no bag or tar can have samples that are kept and not listed, for which commands are refused."""
        return self.known.drop and not source.options.include and not source.options.exclude

    def refusal(self, source: Source, expected: Live) -> bool | None:
        """Return whether the guards refuse this, by the rules of DESIGN; None where this test does not say."""
        before = self.known.live.get(source.name, {})
        listed = source.rows()
        paths = {row.source for row in listed.values()}
        if self.options.kind != "folder" or not before:
            return None if before else False
        gone = {key: row for key, row in before.items() if key not in expected and row.source not in paths}
        if not gone:
            return False
        if len(gone) > FREE and len(gone) > SHARE * len(before):
            return True

        def folder(row: Row, depth: int) -> str:
            parts = row.source.split("/")
            return "/".join(parts[:depth]) if len(parts) > depth else ""

        lost = [
            {row.label for row in gone.values() if row.good} - {row.label for row in listed.values()},
            {row.split for row in gone.values()} - {row.split for row in listed.values()},
        ]
        for depth in (1, 2) if self.options.by == "folders" else (1,):
            lost.append({folder(row, depth) for row in gone.values()} - {folder(row, depth) for row in listed.values()})
        return any(names - {""} for names in lost)

    def require_said(self, pattern: str) -> None:
        if not re.search(pattern, self.said, re.DOTALL):
            raise Wrong(f"expected {pattern!r} in the message, found:\n{self.said}")

    # --- what is there

    def untouched(self, what: str, *kinds: str) -> None:
        """Wrong if a command wrote anything that is committed to these artefacts, by default to both."""
        for kind in kinds or self.stamps:
            before, after = self.stamps[kind], self._stamps(kind)
            if after != before:
                new, lost = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
                raise Wrong(f"{what} changed the {kind}: new {new}, gone {lost}, others {_others(before, after)}")

    def _stamps(self, kind: str) -> dict[str, tuple[object, ...]]:
        return {name: stamp for name, stamp in self.place.stamps(f"{self.name}/{kind}").items() if not name.startswith(".tmp/")}

    def _old_files(self, kind: str) -> None:
        """Wrong if a file of before is gone or was written again; then those of now are those of before."""
        before, after = self.stamps[kind], self._stamps(kind)
        if gone := sorted(before.keys() - after.keys()):
            raise Wrong(f"files of the {kind} are gone: {gone}")
        if others := _others(before, after):
            raise Wrong(f"files of the {kind} were written again: {others}")
        self.stamps[kind] = after

    def expected(self) -> Live:
        """Return the samples that the dataset should have: those that are no quarantined ones."""
        return {key: row for live in self.known.live.values() for key, row in live.items() if row.good}

    def check(self, *, fresh: bool = True) -> None:
        """Compare the dataset with the rules of this test and with a fresh one."""
        self._old_files("dataset")
        dataset = open_dataset(self.url("dataset"))
        rows, found = self._rows(dataset)
        expected = {key: row.place() for key, row in self.expected().items()}
        if self.options.resize:
            found, expected = ({key: row[:-1] for key, row in each.items()} for each in (found, expected))
        if found != expected or len(rows) != len(found):
            lost, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
            other = [(key, found[key], expected[key]) for key in found.keys() & expected.keys() if found[key] != expected[key]]
            raise Wrong(f"the dataset lacks {lost}, has besides {more}, has otherwise {other[:5]} ({len(rows)} rows)")
        if (content := watch.content_sha256(rows)) != dataset.manifest.content_sha256:
            raise Wrong(f"content_sha256 is {dataset.manifest.content_sha256}, that of the rows {content}")
        if self.options.bags:
            self._check_bags(dataset)
        report = verify_dataset(dataset, read_data=not fresh or self.rng.random() < 0.4)
        if report.problems:
            raise Wrong(f"verify: {report.problems}")
        for number in range(1, dataset.number) if self.rng.random() < 0.2 and self.options.kind != "adopted" else ():
            if problems := verify_dataset(open_dataset(dataset.url, number)).problems:
                raise Wrong(f"verify of generation {number}: {problems}")
        self.count("check", "dataset")
        if fresh:
            other = self.fresh()
            if other is not None:
                made, new = _facts(dataset), _facts(other)
                if made != new:
                    raise Wrong(f"a fresh dataset has {new}, this one {made}")
                self.count("check", "fresh dataset")

    def _check_bags(self, dataset: Dataset) -> None:
        where: dict[str, str] = {}
        for shard in dataset.manifest.shards:
            groups = dataset.index(shard)["group"].to_pylist() if shard.live else []
            runs = [group for row, group in enumerate(groups) if row == 0 or groups[row - 1] != group]
            for group in runs:
                if group in where:
                    raise Wrong(f"bag {group!r} is in pieces, in {where[group]} and {shard.stem}")
                where[group] = shard.stem

    def _rows(self, dataset: Dataset) -> tuple[list[dict[str, Any]], dict[str, tuple[Any, ...]]]:
        """Return the rows of the live indexes, and by key what readers find of a sample."""
        rows, found = list[dict[str, Any]](), dict[str, tuple[Any, ...]]()
        for shard in dataset.manifest.shards:
            if not shard.live:
                continue
            index = dataset.index(shard)
            with contextlib.closing(dataset.reader(shard)) as reader:
                stored = reader.index["ordinal"].to_pylist()
                places = [stored.index(ordinal) for ordinal in index["ordinal"].to_pylist()]
                live = [{**row, "split": shard.split} for row in index.to_pylist()]
                rows += live
                for row, data in zip(live, reader.read_rows(places), strict=True):
                    columns = tuple(sorted(watch.columns_of(row).items()))
                    value = sha256(_pixels(data) if self.options.kind == "arrays" else data)
                    found[row["key"]] = (shard.split, row["label_name"] or "", row["group"] or "", columns, value)
        return rows, found

    def fresh(self) -> Dataset | None:
        """Return a fresh dataset of the sources, or of everything that was seen; None where neither tells. It is made once a state."""
        if not self.is_fresh_made:
            shutil.rmtree(self.fresh_folder, ignore_errors=True)
            self.is_fresh_made, self.fresh_one = True, self._fresh()
        return self.fresh_one

    def _fresh(self) -> Dataset | None:
        folder, first = self.fresh_folder, True
        out = str(folder / "out") if self.local or self.options.kind != "adopted" else self.url(f"fresh-{self.commands}")
        for number, source in enumerate(self.sources):
            if source.name not in self.known.live:
                continue
            seen = folder / f"seen-{number}"
            live, listed = self.known.live[source.name], source.rows()
            words = self.shard(source)
            if live.keys() != listed.keys() or any(live[key].place() != row.place() for key, row in listed.items()):
                if self.options.kind != "folder" or not self._written(source, live, seen):
                    return None
                words[1] = str(seen)
                words = [word for word in words if not word.startswith(("source.include", "source.exclude"))]
            words[2] = out
            words = [word for word in words if not word.startswith(("shards.removed", "source.name"))]
            self.run([*words, *(["shards.removed=drop"] if first else [])])
            first = False
        return open_dataset(out)

    def _written(self, source: Source, live: Live, folder: Path) -> bool:
        """Write the files of samples as they were seen; return whether a source of these alone has the same keys."""
        there = type(source)(Local(folder.parent), folder.name, self.options, self.rng, bad=source.bad, opaque=source.opaque)
        for row in live.values():
            there.put(row.source, source.seen[row.value])
        there.options = dataclasses.replace(self.options, include=(), exclude=())
        return {key: row.place() for key, row in there.rows().items()} == {key: row.place() for key, row in live.items()}

    def check_table(self) -> None:
        """Compare the table with a fresh one of a fresh dataset."""
        self._old_files("table")
        table = open_table(self.url("table"))
        rows = _table_rows(table)
        verify_table(table, read_data=self.rng.random() < 0.5, dataset_url=self.url("dataset"))
        self.count("check", "table")
        other, words = self.fresh(), self.encode()
        words[2] = self.url("dataset") if other is None else other.url
        words[3] = str(self.session.base / "data" / "fresh-table")
        try:
            self.run(words)
            new = _table_rows(open_table(words[3]))
        finally:
            shutil.rmtree(words[3], ignore_errors=True)
        if other is not None:
            self.count("check", "fresh table")
        if rows != new:
            lost, more = sorted(new.keys() - rows.keys()), sorted(rows.keys() - new.keys())
            differ = [(key, rows[key], new[key]) for key in sorted(rows.keys() & new.keys()) if rows[key] != new[key]]
            raise Wrong(f"the table lacks {lost}, has besides {more}, has otherwise {differ[:2]}")


def _others(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() & after.keys() if before[name] != after[name])


def _pixels(data: bytes) -> bytes:
    import io

    return np.asarray(Image.open(io.BytesIO(data))).tobytes()


def _facts(dataset: Dataset) -> dict[str, Any]:
    """Return what a dataset and a fresh one of the same samples have in common."""
    manifest = dataset.manifest
    splits = {name: counts for name, counts in manifest.statistics.items() if counts.samples or counts.quarantined}
    return {
        "content": manifest.content_sha256,
        "splits": {
            name: (counts.samples, counts.quarantined, {label: count for label, count in counts.classes.items() if count})
            for name, counts in splits.items()
        },
        "extensions": {name: count for name, count in manifest.sample.extensions.items() if count},
        "shapes": {name: count for name, count in manifest.sample.shapes.items() if count},
        "reasons": {name: count for name, count in manifest.reasons.items() if count},
        "bags": sum(manifest.num_groups(name) for name in splits if name in manifest.splits),
    }


def _table_rows(table: LatentTable) -> dict[str, tuple[Any, ...]]:
    """Return the rows of a table by key, without what says where they are; Wrong if one is there twice.

    The source of a member of a tar has its place, which may be another one by now.
    """
    rows = table.dataset().to_table().to_pylist()
    found = {}
    for row in rows:
        values = {
            name: value
            for name, value in row.items()
            if name not in ("shard", "ordinal", "label") and not (name == "source" and ".tar#" in value)
        }
        bits = {name: np.asarray(value, np.float32).tobytes() for name, value in values.items() if isinstance(value, list | float)}
        found[row["key"]] = tuple(sorted((values | bits).items()))
    if len(found) != len(rows) or len(rows) != table.num_rows:
        raise Wrong(f"{len(rows)} rows of {len(found)} keys, the manifest says {table.num_rows}")
    return found


# --- what happens while a dataset is made


def _plain(one: History, source: Source) -> None:
    one.follow(source)


def _again(one: History, source: Source) -> None:
    """Nothing happens between two runs: the second writes nothing."""
    one.follow(source)
    one._old_files("dataset")
    one.run(one.shard(source))
    one.untouched("a command with nothing to do")


def _checksum(one: History, source: Source) -> None:
    one.follow(source, "--checksum")


def _dry(one: History, source: Source) -> None:
    """A dry run says what the run does then, and writes nothing."""
    before, listed = one.known.live.get(source.name), source.rows()
    one.run([*one.shard(source, "shards.max_removed=1"), "--dry-run", "--json"], 0, 3)
    one.untouched("a dry run")
    said = re.search(r"^\{.*^\}", one.said, re.DOTALL | re.MULTILINE)
    stuck = one.stuck(source, one.known.after(source, False, one.known.drop))
    if said and before is not None and not stuck and source.options.kind == "folder":
        sources = {row.source for row in listed.values()}
        missing = {row.source for key, row in before.items() if key not in listed}
        kept = one.known.after(source, False, one.known.drop)
        expected = {
            "added": sum(key not in before and row.source not in missing for key, row in listed.items()),
            "removed": sum(key not in kept and row.source not in sources for key, row in before.items()),
            "retried": sum(not row.good and key in listed and listed[key].value != row.value for key, row in before.items()),
        }
        changes = json.loads(said[0])["changes"]
        if {name: changes[name]["samples"] for name in expected} != expected:
            raise Wrong(f"a dry run says {changes}, expected {expected}")
        one.count("check", "dry run")
    one.follow(source)


def _kill(one: History, source: Source) -> None:
    """Commands are killed; what happens to the source in between, the last one makes good."""
    for _ in range(one.rng.randint(1, 3)):
        before = one.number()
        one.killed(one.shard(source, "shards.max_removed=1"), "dataset", FAULTS)
        one._old_files("dataset")
        if one.number() != before:
            one.made(source)
        if one.rng.random() < 0.4:
            one._live(source, one.rng.randint(1, 3))
        if one.rng.random() < 0.2 and one.number():
            collect_garbage(one.url("dataset"), older_than_s=0, unfinished=True)
            one.stamps["dataset"] = one._stamps("dataset")
            one.count("event", "gc after a kill")
    one.run(one.shard(source, "shards.max_removed=1"))
    one.made(source)


def _two(one: History, source: Source) -> None:
    """Two commands at once, of one source or of two; sometimes something happens between their starts."""
    others = [other for other in one.sources if other is not source]
    other = one.rng.choice([source, *others])
    one.count("two at once", "of two origins" if others and other is not source else "of one origin")
    with one.begun(one.shard(source, "shards.max_removed=1")) as first:
        time.sleep(one.rng.choice((0.0, one.rng.uniform(0, 0.5))))
        if one.rng.random() < 0.4 and one.known.drop:  # else it matters what was seen
            one._live(other, 2)
        with one.begun(one.shard(other, "shards.max_removed=1")) as second:
            for process in (first, second):
                one.ended(process, 0, 1, *((3, 4) if one.options.kind in ("adopted", "tars", "arrays") else ()))
    for each in dict.fromkeys((source.name, other.name)):
        which = source if each == source.name else other
        one.run(one.shard(which, "shards.max_removed=1"))
        one.made(which)


def _written(one: History, source: Source) -> None:
    """A program rewrites a file while it is read; the run after that has what it left."""
    path = one.rng.choice(sorted(source.files))
    data = source.files[path]
    versions = [picture(source.number(), path.rpartition(".")[2]) for _ in range(3)] if one.options.kind == "folder" else [data]
    assert isinstance(one.place, Local)
    one.session.beside.send(("write", str(one.place.root / source.name / path), versions))
    try:
        for _ in range(one.rng.randint(1, 2)):
            one.run(one.shard(source, "shards.max_removed=1"), 0, 3, 4)
    finally:
        one.count("writer", "versions", one.session.ask("written"))
        data = source.files[path] = one.place.read(f"{source.name}/{path}")
        source.seen[sha256(data)] = data
        one.session.beside.send(("watch", one.url("dataset"), one.url("table"), one.options.kind != "adopted"))
    one.run(one.shard(source, "shards.max_removed=1"))
    one.made(source)


def _unlisted(one: History, source: Source) -> None:
    """A folder, or a page of a listing, cannot be read: nothing is removed, nothing written."""
    words = one.shard(source, "shards.max_removed=1")
    if isinstance(one.place, Bucket):
        one.place.proxy.add(
            rf"^GET /{one.place.s3.bucket}/?\?.*prefix={one.name}(%2F|/)", "status", status=403, code="AccessDenied", times=None
        )
        try:
            one.run(words, 4)
        finally:
            one.place.quiet()
    else:
        folders = sorted({path.rpartition("/")[0] for path in source.files})
        folder = one.place.root / source.name / one.rng.choice(folders)
        mode = folder.stat().st_mode
        folder.chmod(0)
        try:
            with _somebody():
                one.run(words, 4)
        finally:
            folder.chmod(mode)
    one.untouched("a command whose source could not be listed")
    one.follow(source)


@contextlib.contextmanager
def _somebody() -> Iterator[None]:
    """Be a user who may not read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def _lost(one: History, source: Source) -> None:
    """A class folder, or all of the source, is not there: refused; then it is there again, or the loss is meant."""
    listed = source.rows()
    labels = sorted(
        {row.label for row in one.known.live.get(source.name, {}).values() if row.good} & {row.label for row in listed.values()}
    )
    label = one.rng.choice(labels) if labels else ""
    away = sorted({row.source for row in listed.values() if row.label == label})
    if not label or not isinstance(source, KINDS["folder"]) or not source.spares(*away) or not one.known.drop:
        one.follow(source)
        return
    one.count("guard", "a lost class")
    files = {path: source.files[path] for path in away}
    for path in away:
        source.remove(path)
    if one.stuck(source, one.known.after(source, False, True)):
        for path, data in files.items():
            source.put(path, data)
        one.follow(source)
        return
    outside = one.refusal(source, one.known.after(source, False, True))
    one.run(one.shard(source), *((3,) if outside else (0, 3)))
    if not outside:
        one.made(source)
        return
    one.untouched("a command that would lose a class")
    one.require_said("would lose .*Nothing was written.*shards.max_removed=")
    if one.rng.random() < 0.6:
        for path, data in files.items():
            source.put(path, data)
    one.run(one.shard(source, "shards.max_removed=1"))
    one.made(source)


def _gone(one: History, source: Source) -> None:
    """The whole source is not there: refused."""
    name = f"{source.name}-away"
    one.place.rename(source.name, name)
    try:
        one.run(one.shard(source, "shards.max_removed=1"), 3, 4)
        one.untouched("a command without a source")
    finally:
        one.place.rename(name, source.name)
    one.follow(source)


def _many(one: History, source: Source) -> None:
    """More are gone than `shards.max_removed` allows."""
    if isinstance(source, KINDS["folder"]):
        paths = sorted(source.files)
        away = one.rng.sample(paths, min(len(paths), max(12, len(paths) // 3)))
        if source.spares(*away):
            for path in away:
                source.remove(path)
            one.count("step", "many deleted")
    one.follow(source)


def _filter(one: History, source: Source) -> None:
    """Another filter: what it leaves out stays until that is accepted."""
    choices = [((), ()), ((), ("*.bmp",)), ((f"*/{CLASSES[0]}/*", f"{CLASSES[0]}/*"), ())]
    before = source.options
    include, exclude = one.rng.choice(choices)
    if one.options.bags or one.options.by == "folders":
        include = ()
    source.options = dataclasses.replace(before, include=include, exclude=exclude)
    if sum(row.good for row in source.rows().values()) < 4:
        source.options = before
    accept = one.rng.random() < 0.5
    one.count("step", "another filter, accepted" if accept else "another filter")
    one.follow(source, accept=accept)


def _mode(one: History, source: Source) -> None:
    """Keep or drop what is gone from now on."""
    drop = not one.known.drop
    one.count("step", "removed=drop" if drop else "removed=keep")
    one.follow(source, f"shards.removed={'drop' if drop else 'keep'}", drop=drop)


def _moved(one: History, source: Source) -> None:
    """The source has another address, and the name of the old one."""
    one.follow(source)
    old = one.place.url(source.name)
    live = one.known.live.pop(source.name)
    new = f"{source.name}m"
    one.place.rename(source.name, new)
    source.origin = source.origin or old
    source.name = new
    one.known.live[new] = live
    one.follow(source)


def _taken(one: History, source: Source) -> None:
    """Another source has a key that is known: refused."""
    one.follow(source)
    one._old_files("dataset")
    other = type(source)(one.place, f"{one.name}/other", one.options, one.rng)
    for path, data in source.files.items():
        other.put(path, data)
    one.run(one.shard(other, "shards.max_removed=1"), 3)
    one.require_said("with the keys of this source")
    one.untouched("a source with keys of another one")
    one.place.forget(other.name)


def _always(one: History, night: int) -> bool:
    return True


def _later(one: History, night: int) -> bool:
    return night > 0


def _folders(one: History, night: int) -> bool:
    return night > 0 and one.options.kind == "folder"


Event = Callable[[History, Source], None]
EVENTS: dict[str, tuple[Event, Callable[[History, int], bool]]] = {
    "nothing": (_plain, _always),
    "run twice": (_again, _always),
    "--checksum": (_checksum, _later),
    "--dry-run before": (_dry, _always),
    "killed": (_kill, _always),
    "two at once": (_two, _always),
    "rewritten while it is read": (_written, lambda one, night: one.local),
    "not listed": (_unlisted, _later),
    "class lost": (_lost, _folders),
    "source lost": (_gone, _later),
    "many deleted": (_many, _folders),
    "filter": (_filter, _folders),
    "keep or drop": (_mode, _later),
    "source moved": (_moved, lambda one, night: night > 0 and one.options.kind != "adopted"),
    "keys of another": (_taken, _later),
}


# --- what happens while a table is made


def _encode(one: History, source: Source) -> None:
    one.run(one.encode())


def _encode_killed(one: History, source: Source) -> None:
    for _ in range(one.rng.randint(1, 3)):
        one.killed(one.encode(), "table", TABLE_FAULTS)
        one._old_files("table")
        if one.rng.random() < 0.3:  # the dataset goes on before the table is there
            one._live(source, one.rng.randint(1, 3))
            one.follow(source)
            one.check(fresh=False)
    one.run(one.encode())


def _encode_twice(one: History, source: Source) -> None:
    with one.begun(one.encode()) as first:
        time.sleep(one.rng.choice((0.0, one.rng.uniform(0, 0.5))))
        with one.begun(one.encode()) as second:
            for process in (first, second):
                one.ended(process, 0, 1)
    one.run(one.encode())


def _encode_idle(one: History, source: Source) -> None:
    one.run(one.encode())
    one._old_files("table")
    one.run(one.encode())
    one.untouched("encoding with nothing to do")


def _encode_beside(one: History, source: Source) -> None:
    """The dataset gets its next generation while the table of this one is made."""
    with one.begun(one.encode()) as process:
        time.sleep(one.rng.uniform(0, 0.3))
        one._live(source, one.rng.randint(1, 4))
        one.follow(source)
        one.ended(process, 0, *((3,) if one.options.kind == "adopted" else ()))  # a tar of it is another one now
    one.check(fresh=False)
    one.run(one.encode())


TABLE_EVENTS: dict[str, Event] = {
    "nothing": _encode,
    "run twice": _encode_idle,
    "killed": _encode_killed,
    "two at once": _encode_twice,
    "the dataset goes on meanwhile": _encode_beside,
}
