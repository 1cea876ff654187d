from typing import Literal

import pytest

from aecore.errors import ConfigError
from aecore.registry import Registry, flatten, from_dict, knob, spec, to_dict


@spec
class InnerSpec:
    kind: Literal["inner"] = knob("inner", "kind")
    width: int = knob(3, "width", ge=1)


@spec
class OuterSpec:
    inner: InnerSpec = knob(InnerSpec(), "inner")
    sizes: tuple[int, ...] = knob((1, 2), "sizes", ge=1)
    share: float = knob(0.5, "share", gt=0, le=1)
    free: float = knob(0.0, "any finite number")
    table: dict[str, float] | None = knob(None, "numbers by name")
    cache: int = knob(7, "cache", identity=False)


def test_specs_round_trip_through_plain_data():
    outer = OuterSpec(sizes=(4, 5), share=1.0)
    data = to_dict(outer)
    assert data == {"inner": {"kind": "inner", "width": 3}, "sizes": [4, 5], "share": 1.0, "free": 0.0, "table": None, "cache": 7}
    data["inner"] = from_dict(InnerSpec, data["inner"])
    assert from_dict(OuterSpec, data) == outer


def test_a_tree_is_flattened_to_dotted_keys_in_its_order():
    tree = {"b": {"y": 1, "x": (2, 3)}, "a": None, "empty": {}, "rows": [{"n": 4}, 5]}
    assert list(flatten(tree)) == [("b.y", 1), ("b.x", [2, 3]), ("a", None), ("rows", [{"n": 4}, 5])]
    with_lists = [("b.y", 1), ("b.x.0", 2), ("b.x.1", 3), ("a", None), ("rows.0.n", 4), ("rows.1", 5)]
    assert list(flatten(tree, lists=True)) == with_lists
    assert list(flatten({})) == []


def test_fields_that_cannot_change_the_artefact_are_not_part_of_the_identity():
    assert "cache" not in to_dict(OuterSpec(), identity_only=True)


@pytest.mark.parametrize(
    "bad",
    [
        {"share": 0.0},
        {"share": 1.1},
        {"share": float("nan")},
        {"free": float("inf")},
        {"free": float("-inf")},
        {"table": {"a": float("nan")}},
        {"sizes": (0,)},
    ],
)
def test_values_out_of_bounds_are_refused_with_the_value_and_the_bound(bad):
    with pytest.raises(ConfigError, match=r"OuterSpec\.\w+ is .*, expected"):
        OuterSpec(**bad)


def test_an_unknown_literal_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'inner'"):
        InnerSpec(kind="iner")  # type: ignore[arg-type]  # the point of the test


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown key 'widht' in InnerSpec .*did you mean 'width'"):
        from_dict(InnerSpec, {"widht": 1})


def test_an_unknown_kind_names_the_nearest_and_the_known_ones():
    registry = Registry("thing", ())
    registry.register(InnerSpec)(lambda spec: spec.width)
    assert registry.kinds() == ["inner"]
    assert registry.build(InnerSpec(width=5)) == 5
    with pytest.raises(ConfigError, match="unknown thing kind 'iner' .*did you mean 'inner'"):
        registry.from_dict({"kind": "iner"})
    with pytest.raises(ConfigError, match="needs a `kind`"):
        registry.from_dict({"width": 1})


def test_two_parts_cannot_share_a_kind():
    @spec
    class OtherSpec:
        kind: Literal["inner"] = knob("inner", "kind")

    registry = Registry("thing", ())
    registry.register(InnerSpec)(lambda spec: spec)
    with pytest.raises(ConfigError, match="already taken by InnerSpec"):
        registry.register(OtherSpec)(lambda spec: spec)
