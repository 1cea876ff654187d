"""`python -m tests.chaos [seconds=60] [seed=0] [store=local|s3] [round=N]`: play rounds, print counts.

Exit 1 if a count of what must not be is not 0, or if a class that was played injected nothing.
"""

import importlib
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.counts import print_counts
from tests.chaos.faults import FAULTS
from tests.chaos.places import place
from tests.chaos.rounds import Bench, Round, Tally, play
from tests.chaos.work import PIPELINE, WORKS, Work

DEFAULTS = {"seconds": "60", "seed": "0", "store": "local", "round": ""}
TRIED = 4  # times a class is played that injected nothing
LONG_S = 300  # a session of that many seconds also runs the pipeline, whose server takes its time to start
OTHERS = ("flips", "histories", "inputs", "ray_data")  # modules with a command of their own
COLUMNS = ("rounds", "injected", "noticed", "lost", "doubled", "wrong", "hung", "unexplained")


def choose(seed: str, store: str, number: int, seconds: float) -> tuple[str, Work, random.Random]:
    """Return class of faults, work and generator of a round: every class once before one comes again."""
    names = sorted(FAULTS[store])
    random.Random(f"{seed}/{store}/cycle {number // len(names)}").shuffle(names)
    rng = random.Random(f"{seed}/{store}/round {number}")
    return names[number % len(names)], rng.choice((*WORKS, *WORKS, PIPELINE) if seconds >= LONG_S else WORKS), rng


def main(words: list[str]) -> int:
    """Play the rounds that the words ask for, or run another of the commands."""
    if words[:1] and words[0] in OTHERS:
        return int(importlib.import_module(f"tests.chaos.{words[0]}").main(words[1:]))
    asked = dict(word.partition("=")[::2] for word in words)
    unknown = asked.keys() - DEFAULTS.keys()
    options = DEFAULTS | asked
    if unknown or options["store"] not in FAULTS:
        print(f"{' '.join(words)}: expected seconds=N seed=N store={'|'.join(FAULTS)} round=N", file=sys.stderr)
        return 2
    seconds, seed, store = float(options["seconds"]), options["seed"], options["store"]
    base = Path(tempfile.mkdtemp(prefix="aecore-chaos-"))
    tallies = {name: Tally() for name in sorted(FAULTS[store])}
    try:
        with place(store, base) as where:
            bench = Bench(base, where)
            begun = time.monotonic()
            bench.prepare()
            print(f"{store}: every command once without faults in {time.monotonic() - begun:.0f} s; rounds in {base}", flush=True)
            begun, number = time.monotonic(), int(options["round"] or 0)
            while time.monotonic() - begun < seconds:
                name, work, rng = choose(seed, store, number, seconds)
                at = time.monotonic()
                for attempt in range(TRIED):  # a command may be over before its fault comes
                    folder = f"round-{number:04d}" + (f"-{attempt}" if attempt else "")
                    found = play(Round(bench, folder, work, rng, folder), FAULTS[store][name])
                    tallies[name].add(found)
                    if found.injected or found.bad:
                        break
                result = f"{found.injected} injected, {'BAD' if found.bad else 'ok'}, {time.monotonic() - at:.0f} s"
                print(f"round {number}: {work.name}, {name}: {result}", flush=True)
                if found.bad:
                    repeat = f'make chaos ARGS="seconds={options["seconds"]} seed={seed} store={store} round={number}"'
                    notes = "\n".join(found.notes)
                    print(f"{notes}\nits folder: {base}; again: {repeat}", flush=True)
                number += 1
                if options["round"]:
                    break
        return report(tallies)
    finally:
        if not any(tally.bad for tally in tallies.values()):
            shutil.rmtree(base, ignore_errors=True)


def report(tallies: dict[str, Tally]) -> int:
    """Print the table; return the exit status."""
    print_counts("faults", COLUMNS, {name: {column: getattr(tally, column) for column in COLUMNS} for name, tally in tallies.items()})
    idle = [name for name, tally in tallies.items() if tally.rounds and not tally.injected]
    for name in idle:
        print(f"{name}: {tallies[name].rounds} rounds, and nothing was injected: this class proves nothing")
    return int(bool(idle) or any(tally.bad for tally in tallies.values()))


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # clients of a bucket that is gone are not worth waiting for
