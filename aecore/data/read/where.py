"""A predicate over the columns of an index, as text: `label_name in ("cat", "dog") and width >= 64`.

Names, literals, comparisons, `and or not`, `in`, `is null` and nothing else; SQL's `=`, `<>`, `AND`, `IN` mean the same. The text is parsed
once into a pyarrow expression: nothing else is evaluated. A comparison with a missing value (null, NaN) is false, also under `not`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aecore.data.format.index import plain_type
from aecore.errors import ConfigError, did_you_mean
from aecore.registry import shown

MOST_CHARACTERS, MOST_LEVELS, MOST_TERMS = 1 << 16, 64, 4096  # of a text, of its parentheses and `not`, of its comparisons
ALIASES = {"sample_sha256": "sha256"}  # as the table names it -> column of the index
_SCALARS = {"true": True, "false": False}
_ROW = "\0row"  # no name of a column
_WORDS = {"and", "or", "not", "in", "is", "null", "none", *_SCALARS}
_OPERATORS = {
    name: getattr(pc, function)
    for names, function in (
        ("= ==", "equal"),
        ("!= <>", "not_equal"),
        ("<", "less"),
        ("<=", "less_equal"),
        (">", "greater"),
        (">=", "greater_equal"),
    )
    for name in names.split()
}
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
  | (?P<text>'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*")
  | (?P<quoted>`[^`]+`)
  | (?P<name>[^\W\d]\w*)
  | (?P<sign><=|>=|==|!=|<>|[=<>(),\[\]])
    )""",
    re.VERBOSE,
)
Expression = Any  # any: pyarrow's stubs know no operators of expressions


@dataclass(frozen=True, slots=True)
class Where:
    """A parsed predicate: its text, the columns of the index that it names, and the pyarrow expression."""

    text: str
    columns: frozenset[str]
    expression: Expression

    def mask(self, index: pa.Table) -> NDArray[np.bool_]:
        """Return `[n]`: which rows of an index are chosen; a column that the index lacks has no values. ConfigError if types do not fit."""
        arrays: dict[str, Any] = {
            name: index[name].cast(plain_type(index[name].type)) for name in self.columns if name in index.column_names
        }
        lacking = self.columns - arrays.keys()
        mask = np.zeros(len(index), np.bool_)
        try:
            expression = self.expression if not lacking else parse_where(self.text, lacking).expression
            found = pa.table({**arrays, _ROW: pa.array(np.arange(len(index)))}).filter(expression)
        except (pa.ArrowException, TypeError, ValueError) as error:
            types = ", ".join(f"{name}: {column.type}" for name, column in sorted(arrays.items()))
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"where {shown(self.text)} does not fit the types of the columns ({types}): {reason}") from error
        mask[found[_ROW].to_numpy()] = True
        return mask

    def require_known(self, known: Iterable[str]) -> None:
        """ConfigError that shows the nearest known names if an index has none of a column."""
        names = {*known}
        for name in sorted(self.columns - names):
            raise ConfigError(
                f"where {shown(self.text)} names a column {name!r} that no index of the dataset has{did_you_mean(name, names)}"
            )


def parse_where(text: str, lacking: Iterable[str] = ()) -> Where:
    """Return the predicate of a text; ConfigError that shows where it cannot be read. Columns in `lacking` have no values."""
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"where has {len(text):,} characters, expected at most {MOST_CHARACTERS:,}")
    return _Parser(text, frozenset(lacking)).whole()


@dataclass(frozen=True, slots=True)
class _Operand:
    """A column (`name`) or a literal (`value`)."""

    name: str | None = None
    value: Any = None  # any: a number, a text, a boolean

    @property
    def expression(self) -> Expression:
        return pc.scalar(self.value) if self.name is None else pc.field(self.name)


class _Parser:
    """Recursive descent: or, and, not, parentheses, comparison."""

    def __init__(self, text: str, lacking: frozenset[str]) -> None:
        self.text, self.lacking = text, lacking
        self.tokens = list(self._tokens())
        self.place, self.terms, self.columns = 0, 0, set[str]()

    def _tokens(self) -> Iterator[tuple[str, str, int]]:
        place, end = 0, len(self.text.rstrip())
        while place < end:
            match = _TOKEN.match(self.text, place)
            if match is None:
                rest = self.text[place:].lstrip()
                raise ConfigError(f"where {shown(self.text)} cannot be read at {shown(rest[:20])}: {EXPECTED}")
            kind, value = str(match.lastgroup), str(match[str(match.lastgroup)])
            if kind == "name" and value.lower() in _WORDS:
                kind, value = "word", value.lower()
            yield kind, value, match.start(str(match.lastgroup))
            place = match.end()

    def whole(self) -> Where:
        expression = self._any_of(0)
        if self.place < len(self.tokens):
            self._refuse("the end, `and` or `or`")
        return Where(self.text, frozenset(self.columns), expression)

    def _refuse(self, expected: str) -> NoReturn:
        found = shown(self.text[self.tokens[self.place][2] :][:20]) if self.place < len(self.tokens) else "its end"
        raise ConfigError(f"where {shown(self.text)} cannot be read at {found}: expected {expected}. {EXPECTED}")

    def _takes(self, *values: str) -> str | None:
        if self.place < len(self.tokens) and self.tokens[self.place][0] in ("word", "sign") and self.tokens[self.place][1] in values:
            self.place += 1
            return self.tokens[self.place - 1][1]
        return None

    def _any_of(self, level: int) -> Expression:
        return self._joined("or", pc.or_kleene, lambda: self._joined("and", pc.and_kleene, lambda: self._not(level)))

    def _joined(self, word: str, join: Callable[..., Expression], read: Callable[[], Expression]) -> Expression:
        terms = [read()]
        while self._takes(word):
            terms.append(read())
        while len(terms) > 1:  # a tree of few levels: deep ones exhaust the stack
            terms = [functools.reduce(join, terms[start : start + 2]) for start in range(0, len(terms), 2)]
        return terms[0]

    def _not(self, level: int) -> Expression:
        if level > MOST_LEVELS:
            raise ConfigError(f"where {shown(self.text)} has more than {MOST_LEVELS} levels of parentheses and `not`")
        if self._takes("not"):
            return pc.invert(self._not(level + 1))
        if self._takes("("):
            inside = self._any_of(level + 1)
            if not self._takes(")"):
                self._refuse("`)`")
            return inside
        return self._comparison()

    def _comparison(self) -> Expression:
        self.terms += 1
        if self.terms > MOST_TERMS:
            raise ConfigError(f"where has more than {MOST_TERMS:,} comparisons: choose from a list with `in`")
        left = self._operand()
        if self._takes("is"):
            negated = self._takes("not")
            if not self._takes("null", "none"):
                self._refuse("`null`")
            missing = self._missing(self._column(left))
            return pc.invert(missing) if negated else missing
        negated = self._takes("not")
        if self._takes("in"):
            name, values = self._column(left), self._list()
            chosen = self._known([name], lambda: pc.is_in(pc.field(name), value_set=self._array(values)))
            return pc.invert(chosen) if negated else chosen
        if negated:
            self._refuse("`in`")
        sign = self._takes(*_OPERATORS)
        if sign is None:
            self._refuse("a comparison, `in` or `is null`")
        right = self._operand()
        names = [operand.name for operand in (left, right) if operand.name is not None]
        if not names:
            raise ConfigError(f"where {shown(self.text)} compares two literals: name a column. {EXPECTED}")
        return self._known(names, lambda: _OPERATORS[sign](left.expression, right.expression))

    def _array(self, values: list[Any]) -> Any:  # any: pyarrow's stubs type arrays by their scalars
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            raise ConfigError(f"where {shown(self.text)} has a list of literals of several types: {error}") from error

    def _missing(self, name: str) -> Expression:
        return pc.scalar(True) if name in self.lacking else pc.field(name).is_null(nan_is_null=True)

    def _known(self, names: list[str], compared: Callable[[], Expression]) -> Expression:
        """Return a comparison that is null where one of its columns has no value."""
        null: Expression = pc.scalar(pa.scalar(None, pa.bool_()))  # type: ignore[arg-type]  # the stubs know Python's values only
        if self.lacking & {*names}:
            return null
        return pc.if_else(functools.reduce(pc.or_kleene, map(self._missing, names)), null, compared())

    def _column(self, operand: _Operand) -> str:
        if operand.name is None:
            self.place -= 1
            self._refuse("the name of a column before `in` or `is`")
        return operand.name

    def _list(self) -> list[Any]:
        close = {"(": ")", "[": "]"}[self._takes("(", "[") or self._refuse("a list in parentheses")]
        values = [self._literal()]
        while self._takes(","):
            if self.tokens[self.place : self.place + 1] and self.tokens[self.place][1] == close:
                break  # of a list of one, as Python writes it
            values.append(self._literal())
        if not self._takes(close):
            self._refuse(f"`,` or `{close}`")
        return values

    def _literal(self) -> Any:  # any: a number, a text, a boolean
        operand = self._operand()
        if operand.name is not None:
            self.place -= 1
            self._refuse("a number, a quoted text, true or false")
        return operand.value

    def _operand(self) -> _Operand:
        kind, value, _ = self.tokens[self.place] if self.place < len(self.tokens) else ("", "", 0)
        found = None
        if kind in ("name", "quoted"):
            name = value.strip("`")
            found = _Operand(ALIASES.get(name, name))
            self.columns.add(str(found.name))
        elif kind == "number":
            whole = re.fullmatch(r"-?\d+", value)
            found = _Operand(None, int(value) if whole else float(value))
            if whole and not -(1 << 63) <= int(value) < 1 << 63:
                raise ConfigError(f"where {shown(self.text)} has the number {shown(value)}, expected one of 64 bits")
        elif kind == "text":
            quote = value[0]
            found = _Operand(None, re.sub(r"\\(.)", r"\1", value[1:-1].replace(quote * 2, quote), flags=re.DOTALL))
        elif kind == "word" and value in _SCALARS:
            found = _Operand(None, _SCALARS[value])
        if found is None:
            self._refuse("the name of a column or a literal")
        self.place += 1
        return found


EXPECTED = "A predicate has names of columns, literals, = != < <= > >=, and, or, not, in (...), is null"
