"""Count what a source leaves out or finds odd, by kind, with the first examples of each: ten thousand odd names are one line."""

from collections.abc import Iterable

EXAMPLES, LONGEST_EXAMPLE = 3, 100


class Skipped:
    """Counts by kind, and the first `EXAMPLES` of each kind."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}
        self._kept: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, what: str, example: str, count: int = 1, *, kept: bool = False) -> None:
        """Count something of the kind `what` (a plural: `hard links`); `kept`: it was not left out, but is odd."""
        if kept:
            self._kept.add(what)
        known, examples = self._found.get(what, (0, []))
        if len(examples) < EXAMPLES and example not in examples:
            examples.append(example)
        self._found[what] = known + count, examples

    def kinds(self) -> Iterable[tuple[str, int, str]]:
        """Yield each kind, sorted, with its count and a text that names examples."""
        for what in sorted(self._found):
            count, examples = self._found[what]
            yield what, count, shown_examples(examples, count)

    def lines(self) -> tuple[str, ...]:
        """Return one line for each kind."""
        return tuple(f"{'' if what in self._kept else 'skipped '}{count} {what} ({examples})" for what, count, examples in self.kinds())


def shown_examples(examples: list[str], count: int) -> str:
    """Return the first of `count` names as messages show them."""
    names = [repr(name if len(name) <= LONGEST_EXAMPLE else f"{name[:LONGEST_EXAMPLE]}...") for name in examples[:EXAMPLES]]
    return f"{'for example ' if count > len(names) else ''}{', '.join(names)}"
