"""Texts in Arrow are what lists of `str` are, in all that listings ask of them."""

import hashlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aecore import native
from aecore.native import texts
from aecore.native.texts import Texts, joined, numbered, of_folder

LISTS: dict[str, list[str]] = {
    "none": [],
    "plain": ["b/1", "a/2", "b/1", "", "a/10"],
    "other letters": ["é", "日本", "a", "é", "\U0001f600"],
    "no UTF-8": ["\udcff/a", "b", "\udcff/a", "\ud800", "z"],
    "long": [f"{number % 7:0200d}" for number in range(300)],
}
KINDS: dict[str, Callable[[list[str]], Texts]] = {
    "plain": Texts.of,
    "coded": lambda values: Texts.coded(values, np.arange(len(values))),
    "slices": lambda values: joined([Texts.of(["x", *values[:2]])[1:], Texts.of([*values[2:], "x"])[:-1]]),
}
CASES = [pytest.param(made, values, id=f"{kind}-{name}") for kind, made in KINDS.items() for name, values in LISTS.items()]


def blake2b(values: list[str], salt: str) -> list[int]:
    data = [salt.encode() + b"\0" + value.encode("utf-8", "surrogatepass") for value in values]
    return [int.from_bytes(hashlib.blake2b(each, digest_size=8).digest(), "little") for each in data]


@pytest.mark.parametrize(("made", "values"), CASES)
def test_texts_are_the_list_that_they_were_made_of(made: Callable[[list[str]], Texts], values: list[str]) -> None:
    found = made(values)
    assert (list(found), found.tolist(), len(found)) == (values, values, len(values))
    assert found == values and found == made(values) and found != [*values, "a"]
    assert [found[row] for row in range(-len(values), len(values))] == values * 2
    assert (found[1:3], found[::2], found[-2:]) == (values[1:3], values[::2], values[-2:])
    assert ("b" in found, "other" in found) == ("b" in values, False)
    assert pickle.loads(pickle.dumps(found[1:4])) == values[1:4]


@pytest.mark.parametrize(("made", "values"), CASES)
def test_texts_do_what_python_does(made: Callable[[list[str]], Texts], values: list[str]) -> None:
    found, rows = made(values), np.random.default_rng(0).permutation(len(values))
    assert found.take(rows) == [values[row] for row in rows]
    codes, different = found.take(rows).codes()
    assert different == found.take(rows).distinct() == list(dict.fromkeys(values[row] for row in rows))
    assert [different[code] for code in codes] == [values[row] for row in rows]
    assert found.mapped(lambda text: text[:1]) == [text[:1] for text in values]
    assert found.all_different() == (len({*values}) == len(values))
    assert sorted(found.repeated().tolist()) == [row for row, text in enumerate(values) if values.count(text) > 1]
    assert found.is_sorted() == (sorted(values) == values)
    assert found.order().tolist() == sorted(range(len(values)), key=values.__getitem__)
    whole = b"".join(column.data[column.begins[0] : column.ends[-1] + 1].tobytes() for column in found.terminated())
    assert whole == b"".join(text.encode("utf-8", "surrogatepass") + b"\0" for text in values)
    if values:
        assert found.without([1])[:2] == [values[0], None]
        assert found.without([1]).without([0]).missing() == [0, 1]
    shown = [text.encode("utf-8", "backslashreplace").decode() for text in values]
    assert found.column().to_pylist() == shown


@pytest.mark.parametrize("library", ["compiled", "python"])
@pytest.mark.parametrize("salt", ["order 0 train", "x" * 126, "x" * 127, "x" * 300])
@pytest.mark.parametrize(("made", "values"), CASES)
def test_hashes_are_those_of_hashlib(made: Any, values: list[str], salt: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: hashlib, 1.3 us each; a changed bit would put every sample into another shard."""
    if library == "python":
        monkeypatch.setattr(native, "_library", lambda: None)
    assert made(values).hashes(salt).tolist() == blake2b(values, salt)


def test_blocks_of_any_length_are_hashed() -> None:
    values = ["a" * length for length in range(600)]
    assert Texts.of(values).hashes("salt").tolist() == blake2b(values, "salt")


def test_batches_are_joined_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "BATCH", 3)
    monkeypatch.setattr(texts, "_PIECE", 5)
    values = [f"{number % 4}/{number}" for number in range(23)] + ["\udcff"]
    found = Texts.of(values)
    assert found.arrow.num_chunks > 1 and found == values and found.all_different() and not Texts.of([*values, "0/0"]).all_different()
    assert found.hashes("s").tolist() == blake2b(values, "s")
    assert numbered("a/", 23, width=4) == [f"a/{number:04d}" for number in range(23)]
    assert joined([found, numbered("b", 2)]) == [*values, "b0", "b1"]


def test_names_of_a_folder_are_decoded_as_by_python() -> None:
    assert of_folder("a/", b"b.png\0c.png\0") == ["a/b.png", "a/c.png"]
    assert of_folder("", b"\xff\0\xc3\xa9\0") == ["\udcff", "é"]
    assert of_folder("é/", b"") == []


def test_what_is_no_text_is_named() -> None:
    with pytest.raises(TypeError) as error:
        Texts.of(["a", 3])  # type: ignore[list-item]
    assert error.value.args == (3,)
