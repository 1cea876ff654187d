"""kind -> frozen spec -> built part. Adding a part (a model, a backbone, a source) is adding one file.

A spec is a frozen dataclass made with `@spec`; its fields are `knob`s with a default, a bound and one line of description.
The same spec is what YAML holds, what a checkpoint's config.json holds and what Python users write. A `Registry` finds parts by
importing the modules of its packages: there is no second list to keep in step. A part whose module is named as its kind is found by
importing only that one.
A field that is added later is marked (`knob(..., since=2)`), and every artefact that exists keeps its identity.
Specs never name import paths, so reading one cannot execute anything that is not already part of the program.
"""

import dataclasses
import importlib
import math
import pkgutil
import reprlib
from collections.abc import Callable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from aecore.errors import ConfigError, did_you_mean

T = TypeVar("T")
BuildFn = TypeVar("BuildFn", bound=Callable[..., Any])
BOUNDS = {"ge": ">=", "gt": ">", "le": "<="}  # the bounds of a knob, as messages and lists write them
LARGEST_SIZE = 1 << 24  # of one axis of a net or a batch; what a machine can hold is less, and is estimated before it is built
MOST_LAYERS = 128  # of one stack
MOST_NUMBERS = MOST_LAYERS  # in a list of numbers, of which a stack has one for each layer (widths, channels, strides)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def shown(value: object) -> str:
    """Return a value as messages show it: its `repr`, with the middle of a long one left out."""
    return _SHORT.repr(value)


def knob(
    default: Any,  # any: a dataclass field's default has the field's type
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    identity: bool = True,
    since: int = 1,
    absent: Any = dataclasses.MISSING,  # any: as the default
) -> Any:
    """Declare one field of a `@spec`: default, description, inclusive (`ge`, `le`) or strict (`gt`) bounds.

    `identity=False` marks a field that cannot change the artefact (cache sizes, intervals): recorded, but not hashed.

    `since` is the format version that introduced the field. A field newer than version 1 is left out of identities and of a
    checkpoint's config while it has the value that describes the older versions, so artefacts written before it keep their hashes. That
    value is the default; where new artefacts have another default, it is `absent` (see `absent_values`, `as_recorded`).
    """
    assert since > 1 or absent is dataclasses.MISSING, "`absent` is the value that a missing later field implies: give `since` as well"
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "identity": identity}
    if since > 1:
        metadata |= {"since": since, "absent": default if absent is dataclasses.MISSING else absent}
    if isinstance(default, dict | list):
        kind = type(default)
        return dataclasses.field(default_factory=lambda: kind(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, kw_only_default=True)  # no field_specifiers: to a type checker `= knob(...)` is a default
def spec(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only dataclass whose construction checks bounds, literals and that numbers are finite (ConfigError)."""
    own_check: Callable[[T], None] | None = cls.__dict__.get("__post_init__")

    def __post_init__(self: T) -> None:
        _check_fields(self)
        if own_check is not None:
            own_check(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]  # added for the dataclass machinery
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]  # read by pydantic; plain data here
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def _check_fields(instance: Any) -> None:  # any: every spec type passes here
    hints = field_types(type(instance))
    for field in dataclasses.fields(instance):
        value, name = getattr(instance, field.name), f"{type(instance).__name__}.{field.name}"
        hint = hints[field.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(f"{name} is {shown(value)}{did_you_mean(str(value), map(str, get_args(hint)))}")
        items = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else (value,)
        numbers = [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]
        if len(numbers) > MOST_NUMBERS:
            raise ConfigError(f"{name} has {len(numbers):,} numbers, expected at most {MOST_NUMBERS:,}")
        for number in numbers:
            _check_bound(name, number, field.metadata)


def _check_bound(name: str, number: float, bounds: Mapping[str, Any]) -> None:
    ge, gt, le = bounds.get("ge"), bounds.get("gt"), bounds.get("le")
    if number != number or abs(number) == math.inf:
        raise ConfigError(f"{name} is {number}, expected a finite number")
    if isinstance(number, int) and not -(1 << 63) <= number < 1 << 63:
        raise ConfigError(f"{name} is {shown(number)}, expected a number of 64 bits")
    if (ge is not None and number < ge) or (gt is not None and number <= gt) or (le is not None and number > le):
        limits = [f"{sign} {bounds[name]}" for name, sign in BOUNDS.items() if bounds.get(name) is not None]
        raise ConfigError(f"{name} is {number}, expected {' and '.join(limits)}")


def field_types(cls: type) -> dict[str, Any]:
    """Return name -> type of the fields of a spec class (class variables are no fields)."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def to_dict(instance: Any, *, identity_only: bool = False) -> dict[str, Any]:  # any: every spec type
    """Return a spec (or a tree of specs) as plain JSON data.

    With `identity_only` it is the content of identities and of checkpoints' configs: without the `identity=False` fields, and without
    later fields (`since`) that have the value that describes the older versions.
    """
    out: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value, metadata = getattr(instance, field.name), field.metadata
        if identity_only and (not metadata.get("identity", True) or ("absent" in metadata and value == metadata["absent"])):
            continue
        out[field.name] = _plain(value, identity_only)
    return out


def _plain(value: Any, identity_only: bool) -> Any:  # any: a field's value
    if dataclasses.is_dataclass(value):
        return to_dict(value, identity_only=identity_only)
    return list(value) if isinstance(value, tuple) else value


def absent_values(part: Any) -> dict[str, Any]:  # any: every spec type, or an instance of one
    """Return, as plain JSON data, the values of later fields (`since`) that data recorded without them imply.

    Nested specs of an instance are included. `{**absent_values(cls), **recorded}` is the spec that made the artefact.
    """
    out: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name, None)
        if "absent" in field.metadata:
            out[field.name] = _plain(field.metadata["absent"], True)
        elif dataclasses.is_dataclass(value) and (below := absent_values(value)):
            out[field.name] = below
    return out


def as_recorded(asked: T, recorded: Mapping[str, Any]) -> T:
    """Return `asked` with the old value in later fields that the record of an existing artefact lacks and that have their default.

    Otherwise a field whose default improves on the older versions (`absent`) would refuse every artefact of these versions.
    A value other than the default stays: the comparison of identities then names the field and both values.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(asked):  # type: ignore[arg-type]  # every spec is a dataclass
        value = getattr(asked, field.name)
        if dataclasses.is_dataclass(value) and isinstance(known := recorded.get(field.name), Mapping):
            changes[field.name] = as_recorded(value, known)
        elif "absent" in field.metadata and field.name not in recorded and value == default_of(field):
            changes[field.name] = field.metadata["absent"]
    return dataclasses.replace(asked, **changes)  # type: ignore[type-var]  # as above


def default_of(field: "dataclasses.Field[Any]") -> Any:  # any: a field's value
    """Return the default of a field of a spec."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build a spec from plain JSON data; an unknown key is a ConfigError that names the nearest known one, as is another type."""
    hints = field_types(cls)
    for key, value in data.items():
        if key not in hints:
            raise ConfigError(f"unknown key {shown(key)} in {cls.__name__}{did_you_mean(key, hints)}")
        choice = get_origin(hints[key]) is Literal and isinstance(value, str)  # the spec names the choices
        if not choice and not _has_type(value, hints[key]):
            raise ConfigError(f"{cls.__name__}.{key} is {shown(value)} ({type(value).__name__}), expected {_type_name(hints[key])}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def _has_type(value: Any, hint: Any) -> bool:  # any: plain data, or an instance of a spec; the type of a field
    """Return whether plain data has the type of a field: a list is a tuple, a whole number also a float, and a bool is no number."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_has_type(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        kinds = parts[:1] * len(value) if isinstance(value, list | tuple) and Ellipsis in parts else parts
        return isinstance(value, list | tuple) and len(value) == len(kinds) and all(map(_has_type, value, kinds))
    if origin is dict:
        return isinstance(value, Mapping) and all(_has_type(key, parts[0]) and _has_type(item, parts[1]) for key, item in value.items())
    if hint is float:
        return type(value) in (int, float)
    if hint in (bool, int, str, NoneType):
        return type(value) is hint
    return not dataclasses.is_dataclass(hint) or isinstance(value, hint)  # type: ignore[arg-type]  # a hint is a class


def _type_name(hint: Any) -> str:  # any: the type of a field
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint).replace("typing.", "")


def flatten(tree: Any, *, lists: bool = False, prefix: str = "") -> Iterator[tuple[str, Any]]:  # any: plain data
    """Yield the dotted key and the value of every leaf of nested mappings, in order; an empty mapping has none.

    Parameters
    ----------
    tree : Mapping
        Nested mappings; a tuple among the values is returned as a list, as in JSON.
    lists : bool
        Descend into lists and tuples too; the key of an item is its position (`columns.0.name`).
    prefix : str
        Key that all returned keys start with.
    """
    if not isinstance(tree, Mapping) and not (lists and isinstance(tree, list | tuple)):
        yield prefix, list(tree) if isinstance(tree, tuple) else tree
        return
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from flatten(value, lists=lists, prefix=f"{prefix}.{key}" if prefix else str(key))


class Registry:
    """Parts of one noun ("model", "backbone", "source"), found by importing the modules of `packages` when they are asked for."""

    def __init__(self, noun: str, packages: tuple[str, ...]) -> None:
        self.noun = noun
        self._packages = packages
        self._parts: dict[str, tuple[type, Callable[..., Any]]] = {}
        self._discovered = False

    def register(self, spec_type: type) -> Callable[[BuildFn], BuildFn]:
        """Decorate the function `build(spec, ...)` of a part; the kind is the default of the spec's `kind` field."""

        def decorate(build: BuildFn) -> BuildFn:
            kind = next(str(field.default) for field in dataclasses.fields(spec_type) if field.name == "kind")
            known = self._parts.get(kind)
            if known is not None and known[0].__qualname__ != spec_type.__qualname__:
                raise ConfigError(f"{self.noun} kind {kind!r} is already taken by {known[0].__qualname__}: choose another name")
            self._parts[kind] = (spec_type, build)
            return build

        return decorate

    def _modules(self) -> Iterator[tuple[str, str]]:
        """Yield package and name of every module that may hold parts; importing the packages, not the modules."""
        for package in self._packages:
            module = importlib.import_module(package)
            for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
                yield package, info.name

    def _find(self, kind: str) -> None:
        """Import the module of this name, and all others only if no part of this kind is in it."""
        if kind in self._parts or self._discovered:
            return
        for package, name in self._modules():
            if name == kind:
                importlib.import_module(f"{package}.{name}")
        if kind not in self._parts:
            self._discover()

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        for package, name in self._modules():
            importlib.import_module(f"{package}.{name}")

    def kinds(self) -> list[str]:
        """Return the known kinds, sorted."""
        self._discover()
        return sorted(self._parts)

    def spec_type(self, kind: str) -> type:
        """Return the spec class of `kind`; an unknown kind is a ConfigError that names the nearest known one."""
        self._find(kind)
        if kind not in self._parts:
            raise ConfigError(f"unknown {self.noun} kind {shown(kind)}{did_you_mean(kind, self._parts)}")
        return self._parts[kind][0]

    def built_type(self, kind: str) -> Any:  # any: a class, or another annotated return type
        """Return the annotated return type of the build function of `kind` (None if it has none), without building one."""
        self.spec_type(kind)
        build = self._parts[kind][1]
        return build if isinstance(build, type) else get_type_hints(build).get("return")

    def spec_type_of(self, data: Any) -> type:  # any: what should be a mapping
        """Return the spec class that plain data names by its `kind`; ConfigError if it names none."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a {self.noun} is {shown(data)}, expected an object with a `kind`")
        if not isinstance(data.get("kind"), str):
            raise ConfigError(f"a {self.noun} needs a `kind` (known: {', '.join(self.kinds())})")
        return self.spec_type(data["kind"])

    def from_dict(self, data: Mapping[str, Any]) -> Any:  # any: the spec type is chosen by `kind`
        """Build the spec named by `data["kind"]`."""
        return from_dict(self.spec_type_of(data), data)

    def build(self, part_spec: Any, *args: Any, **kwargs: Any) -> Any:  # any: the parts decide what they take and give
        """Build the part of a spec: `build(spec, *args, **kwargs)` of the file that registered its kind."""
        self.spec_type(part_spec.kind)
        return self._parts[part_spec.kind][1](part_spec, *args, **kwargs)


MODELS = Registry("model", ("aecore.mil", "aecore.vanilla", "aecore.variational"))
BACKBONES = Registry("backbone", ("aecore.nn",))
SOURCES = Registry("source", ("aecore.data.sources",))
