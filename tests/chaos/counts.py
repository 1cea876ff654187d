"""What the commands of `make chaos` share: their options, turns over cases, and the table of counts that they end with."""

import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def count_and_seed(command: str, words: Sequence[str]) -> tuple[int, str] | None:
    """Return the values of `count=N seed=N` (1000, 0 where not given); None, with a line on standard error, for other words."""
    options = {"count": "1000", "seed": "0"} | dict(word.partition("=")[::2] for word in words)
    if options.keys() != {"count", "seed"}:
        print(f"{command} {' '.join(words)}: expected count=N seed=N", file=sys.stderr)
        return None
    return int(options["count"]), options["seed"]


def turns(rng: random.Random, count: int, cases: Sequence[T]) -> Iterator[T]:
    """Yield `count` cases, each once before one comes again."""
    left: list[T] = []
    for _ in range(count):
        left = left or rng.sample(cases, len(cases))
        yield left.pop()


def print_counts(what: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, int]]) -> Counter[str]:
    """Print a row of counts for each kind and one of all; return the latter."""
    every: Counter[str] = Counter()
    for row in rows.values():
        every.update(row)
    width = max(map(len, (what, *rows)))
    print("  ".join([what.ljust(width), *columns]))
    for name, row in (*rows.items(), ("all", every)):
        print("  ".join([name.ljust(width), *(str(row.get(column, 0)).rjust(len(column)) for column in columns)]))
    return every
