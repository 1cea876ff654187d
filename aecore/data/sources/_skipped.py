"""Count what a source leaves out or finds odd, by kind, with the first examples of each: ten thousand odd names are one line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

EXAMPLES, LONGEST_EXAMPLE = 3, 100
MANY = 20  # names of a list that is usually shown whole


@dataclass(slots=True)
class _Kind:
    count: int = 0
    examples: list[str] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)
    kept: bool = False


class Skipped:
    """Counts by kind, and the first `EXAMPLES` of each kind."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], _Kind] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, what: str, example: str = "", remedy: str = "", *, count: int = 1, kept: bool = False, ext: str = "") -> None:
        """Count something of the kind `what` (`hard link(s)`).

        `remedy` says what to do about it; EXTS in it becomes the list of all `ext`. `kept`: it was not left out, but is odd.
        """
        known = self._found.get((what, remedy))
        if known is None:
            known = self._found[what, remedy] = _Kind(kept=kept)
        known.count += count
        if ext:
            known.extensions.add(ext)
        if example and len(known.examples) < EXAMPLES and example not in known.examples:
            known.examples.append(example)

    def kinds(self) -> Iterator[tuple[str, int, str]]:
        """Yield each kind, sorted, with its count and a text that names examples."""
        for (what, _), known in sorted(self._found.items()):
            yield what, known.count, shown_examples(known.examples, known.count)

    def lines(self) -> tuple[str, ...]:
        """Return one line for each kind: the count, examples, what to do."""
        return tuple(_line(what, remedy, known) for (what, remedy), known in sorted(self._found.items()))


def _line(what: str, remedy: str, known: _Kind) -> str:
    examples = f" ({shown_examples(known.examples, known.count)})" if known.examples else ""
    exts = f"[{','.join(sorted(known.extensions))}]"
    advice = f": {remedy.replace('EXTS', exts)}" if remedy else ""
    return f"{'' if known.kept else 'skipped '}{of_kind(known.count, what)}{examples}{advice}"


def of_kind(count: int, what: str) -> str:
    """Return the count of a kind for a message: of "(s)" in its name there is an "s" unless there is one."""
    return f"{count} {what.replace('(s)', '' if count == 1 else 's')}"


def shown_examples(examples: list[str], count: int) -> str:
    """Return the first of `count` names as messages show them."""
    names = [repr(name if len(name) <= LONGEST_EXAMPLE else f"{name[:LONGEST_EXAMPLE]}...") for name in examples[:EXAMPLES]]
    return f"{'for example ' if count > len(names) else ''}{', '.join(names)}"


def first_of(names: Sequence[str], most: int = EXAMPLES) -> str:
    """Return the first names as messages show them, and how many more there are: a list of thousands is no help."""
    shown = [name if len(name) <= LONGEST_EXAMPLE else f"{name[:LONGEST_EXAMPLE]}..." for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(shown)}{more}" or "none"
