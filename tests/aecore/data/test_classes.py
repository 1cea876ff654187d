"""Class names: one spelling, an order that only grows, labels that are mapped by name."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aecore.data.classes import UNKNOWN, in_order, label_map, numbers_of, require_known, spelled
from aecore.errors import DataError

NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).map(spelled), unique=True, max_size=12)
FORMS = ("NFC", "NFD")


@given(classes=NAMES, data=st.data())
def test_a_label_keeps_its_name_under_every_permutation_and_in_every_larger_list(classes: list[str], data: st.DataObject) -> None:
    more = data.draw(NAMES)
    other = data.draw(st.permutations([*classes, *(name for name in more if name not in classes)]))
    labels = np.array(data.draw(st.lists(st.integers(-1, len(classes) - 1), max_size=20)), np.int64)
    mapping = label_map(classes, other)
    found = labels if mapping is None else mapping[labels]
    named = [None if label < 0 else classes[label] for label in labels]
    assert [None if label < 0 else other[label] for label in found] == named
    assert (mapping is None) == (classes == other[: len(classes)])


@given(classes=NAMES, missing=st.data())
def test_a_class_that_the_other_list_lacks_is_unknown_and_never_another_one(classes: list[str], missing: st.DataObject) -> None:
    other = [name for name in classes if missing.draw(st.booleans())]
    numbers = numbers_of(classes, other)
    assert {name: other[number] for name, number in numbers.items() if number != UNKNOWN} == {name: name for name in other}
    assert {name for name, number in numbers.items() if number == UNKNOWN} == {*classes} - {*other}


@pytest.mark.parametrize("ours", FORMS)
@pytest.mark.parametrize("theirs", FORMS)
def test_a_name_is_the_same_one_in_every_normal_form(ours: str, theirs: str) -> None:
    names = [unicodedata.normalize(ours, name) for name in ("café", "Ångström", "plain")]
    others = [unicodedata.normalize(theirs, name) for name in ("plain", "Ångström", "café")]
    assert list(numbers_of(names, others).values()) == [2, 1, 0]


def test_where_a_list_has_a_name_in_both_forms_each_stays_its_own() -> None:
    both = [unicodedata.normalize(form, "é") for form in FORMS]
    assert list(numbers_of(both, both).values()) == [0, 1]


def test_numbers_are_ordered_by_value_and_names_by_their_letters() -> None:
    assert in_order(["10", "9", "2", "9"]) == ["2", "9", "10"]
    assert in_order(["b", "10", "9"]) == ["10", "9", "b"]


def test_an_unknown_class_is_named_with_those_that_are_known() -> None:
    require_known({"dog": 3}, ["cat", "dog"], "split 'test'", "the model", "train it again")
    with pytest.raises(
        DataError, match=r"split 'test' has 7 samples of 2 classes 'cow', 'fox', which the model does not have \(it has 'dog'"
    ):
        require_known({"dog": 3, "fox": 4, "cow": 3, "owl": 0}, ["dog"], "split 'test'", "the model", "train it again")
