"""The recipe: one tree for the YAML file, the command line and the parameter of a Prefect flow.

    defaults < file < key.path=value

The sections are the frozen specs of `aecore`; nothing is declared twice. A section is validated (`validate.py`), and its module
imported, when the tree holds it or a step reads it: `aepipe shard` does not import torch. Unknown keys are refused, at the top and
in sections, with the most similar known ones.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import json
import zoneinfo
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from aecore.errors import ConfigError, did_you_mean, require_text, similar
from aecore.registry import BACKBONES, MODELS, SOURCES, Registry, flatten, knob, spec, to_dict
from aecore.store import absolute_url
from pipelines.recipe.nearest import nearest_keys
from pipelines.recipe.validate import MissingKey, build_spec
from pipelines.recipe.yaml import Tree, apply_overrides, read_recipe

if TYPE_CHECKING:
    from aecore.data.about import AboutSpec
    from aecore.data.format.transform import TransformSpec
    from aecore.data.read.loader import InputSpec
    from aecore.data.read.pairs import PairSpec
    from aecore.data.write.spec import ShardSpec
    from aecore.data.write.splits import SplitSpec
    from aecore.encoding.encoder import EncodeSpec
    from aecore.evaluate import EvaluateSpec
    from aecore.sampling import DecodeSpec, SampleSpec
    from aecore.training.job import CheckpointSpec, TrainSpec
    from aecore.training.optimizer import OptimSpec


@spec
class ClusterSpec:
    """Where the work runs; never part of an artefact's identity."""

    kind: Literal["local", "address", "job"] = knob(
        "local",
        "local: this process or a local Ray (RAY_ADDRESS connects to a running one); address: a running cluster; "
        "job: everything runs as a Ray job of that cluster, which this process follows",
        identity=False,
    )
    address: str | None = knob(
        None,
        "address: host:port, auto or ray://host:port (else RAY_ADDRESS); "
        "job: http://host:8265 of the dashboard (else RAY_API_SERVER_ADDRESS, RAY_ADDRESS)",
        identity=False,
    )
    python: str | None = knob(
        None, "job: interpreter on the head node that has aecore; this one where the head is this machine, else `python`", identity=False
    )
    shared_paths: tuple[str, ...] = knob((), "folders that every node sees under the same path (NFS)", identity=False)
    num_workers: int = knob(2, "Ray workers; 0 stays in this process", ge=0, identity=False)
    use_gpu: bool = knob(False, "one GPU per worker", identity=False)
    resources_per_worker: dict[str, float] | None = knob(None, "Ray resources per worker, for example {CPU: 2}", identity=False)
    threads_per_worker: int = knob(1, "torch threads per worker; also its CPUs unless resources_per_worker sets them", ge=1, identity=False)
    max_failures: int = knob(2, "how often training is restarted after a worker died", ge=0, identity=False)
    timeout_s: float = knob(120.0, "longest wait for a cluster or for its resources, in seconds", gt=0, identity=False)

    def __post_init__(self) -> None:
        """ConfigError for combinations that contradict each other."""
        address, job_server = self.address, (self.address or "").startswith(("http://", "https://"))
        if address is not None and self.kind == "local":
            kind = "job" if job_server else "address"
            raise ConfigError(
                f"ClusterSpec.address is {address!r}, which kind=local does not read: add cluster.kind={kind}, or leave it out"
            )
        if self.kind == "address" and job_server:
            raise ConfigError(
                f"ClusterSpec.address is {address!r}, a job server: set cluster.kind=job, or give the cluster's own host:port"
            )
        if self.kind == "job" and address is not None and not job_server:
            raise ConfigError(
                f"ClusterSpec.address is {address!r}, and jobs go to the dashboard of the head: "
                "write cluster.address=http://host:8265, or set cluster.kind=address"
            )
        if self.kind == "address" and self.num_workers == 0:
            raise ConfigError(
                "ClusterSpec.num_workers is 0, which leaves the cluster of kind=address idle: "
                "set cluster.num_workers=1 or more, or cluster.kind=local"
            )
        if self.kind == "job" and self.num_workers == 0 and self.use_gpu:
            raise ConfigError(
                "ClusterSpec.num_workers is 0, which runs a job's work on the head node, and use_gpu=true needs a GPU there: "
                "set cluster.num_workers=1 or more, so that it runs where the GPUs are"
            )
        if self.python is not None and self.kind != "job":
            raise ConfigError(
                f"ClusterSpec.python is {self.python!r}, and only a job has an interpreter to choose: add cluster.kind=job, or leave it out"
            )
        for path in self.shared_paths:
            if not path.startswith("/"):
                raise ConfigError(f"ClusterSpec.shared_paths holds {path!r}, expected folders as absolute paths, for example /mnt/shared")


@spec
class RefreshSpec:
    """What a pipeline does with its model when its dataset has changed."""

    policy: Literal["keep", "continue", "retrain"] = knob(
        "keep",
        "keep: the model that is there encodes the new generation too; continue: a new run starts from the weights of the last one; "
        "retrain: a new run starts as the first one did. New runs and their tables are run-gNNNNNN/ and table-gNNNNNN/",
        since=2,
    )


@spec
class ScheduleSpec:
    """When `aepipe serve` runs the recipe."""

    cron: str | None = knob(None, "cron expression, for example '0 3 * * *'", identity=False)
    timezone: str = knob("UTC", "time zone of the cron expression, for example Europe/Berlin", identity=False)

    def __post_init__(self) -> None:
        """ConfigError for an unknown time zone, before the schedule is used."""
        known = zoneinfo.available_timezones() if self.timezone != "UTC" else frozenset()
        if known and self.timezone not in known:  # without time zone data on this machine the scheduler reports it
            near = _zones_like(self.timezone, known)
            guess = f"did you mean {' or '.join(near)}?" if near else "expected an IANA name such as Europe/Berlin"
            raise ConfigError(f"ScheduleSpec.timezone is {self.timezone!r}, which is no time zone: {guess}")


def _zones_like(name: str, known: Iterable[str]) -> list[str]:
    """Return suggestions for a time zone: those of this city, or the most similar names of zones or cities."""
    word, cities = name.strip().replace(" ", "_").casefold(), dict[str, list[str]]()
    for zone in sorted(known):
        cities.setdefault(zone.rpartition("/")[2].casefold(), []).append(zone)
    zones = {zone.casefold(): zone for zone in known}
    if word in zones or word in cities:
        return [zones[word]] if word in zones else cities[word][:3]
    full = [zones[near] for near in similar(word, zones, count=3, at_least=0.9)]  # `europe/` alone is half a name
    city = [zone for near in similar(word.rpartition("/")[2], cities, count=3) for zone in cities[near]]
    return list(dict.fromkeys([*full, *city]))[:3]


TOP: dict[str, str] = {"name": "mnist-nightly", "data": "./dataset", "run": "./run", "out": "./out"}
SECTIONS: dict[str, str | Registry] = {
    "source": SOURCES,
    "splits": "aecore.data.write.splits:SplitSpec",
    "shards": "aecore.data.write.spec:ShardSpec",
    "about": "aecore.data.about:AboutSpec",
    "model": MODELS,
    "backbone": BACKBONES,
    "transform": "aecore.data.format.transform:TransformSpec",
    "optim": "aecore.training.optimizer:OptimSpec",
    "train": "aecore.training.job:TrainSpec",
    "checkpoint": "aecore.training.job:CheckpointSpec",
    "input": "aecore.data.read.loader:InputSpec",
    "pairs": "aecore.data.read.pairs:PairSpec",
    "encode": "aecore.encoding.encoder:EncodeSpec",
    "evaluate": "aecore.evaluate:EvaluateSpec",
    "sample": "aecore.sampling:SampleSpec",
    "decode": "aecore.sampling:DecodeSpec",
    "cluster": "pipelines.recipe.recipe:ClusterSpec",
    "refresh": "pipelines.recipe.recipe:RefreshSpec",
    "schedule": "pipelines.recipe.recipe:ScheduleSpec",
}
DEFAULT_KINDS = {"source": "folder", "model": "vae", "backbone": "mlp"}


class Recipe:
    """A validated tree; each section is an attribute that gives its spec (`recipe.train.epochs`).

    `tree` holds the given values (plain JSON, the parameter of a flow), `resolved()` all values including the defaults.
    """

    if TYPE_CHECKING:
        source: Any
        splits: SplitSpec
        shards: ShardSpec
        about: AboutSpec
        model: Any
        backbone: Any
        transform: TransformSpec
        optim: OptimSpec
        train: TrainSpec
        checkpoint: CheckpointSpec
        input: InputSpec
        pairs: PairSpec
        encode: EncodeSpec
        evaluate: EvaluateSpec
        sample: SampleSpec
        decode: DecodeSpec
        cluster: ClusterSpec
        refresh: RefreshSpec
        schedule: ScheduleSpec

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.tree: Tree = json.loads(json.dumps(tree))
        self._sections: dict[str, Any] = {}
        self._readable = frozenset([*SECTIONS, *TOP])
        for key, value in flatten(self.tree, lists=True):
            if isinstance(value, str):
                require_text(value, key)
        for key, value in self.tree.items():
            if key in TOP:
                if value is not None and not isinstance(value, str):
                    raise ConfigError(f"{key} is {value!r} ({type(value).__name__}), expected text, for example {key}={TOP[key]}")
            elif key not in SECTIONS:
                raise ConfigError(_unknown(key, self.tree))
        for name in SECTIONS:
            if name in self.tree:
                with contextlib.suppress(MissingKey):  # raised again by the step that reads the section
                    getattr(self, name)

    def __getattr__(self, name: str) -> Any:
        if name not in SECTIONS:
            raise AttributeError(name)
        self._require_readable(name)
        if name not in self._sections:
            self._sections[name] = build_section(name, self.tree.get(name))
        return self._sections[name]

    @property
    def name(self) -> str:
        """Return `name`, or the last folder of `out`."""
        return self.tree.get("name") or (self.tree.get("out") or "aepipe").rstrip("/").rsplit("/", 1)[-1]

    def require(self, key: Literal["data", "run", "out"]) -> str:
        """Return the top-level URL `key`, absolute; ConfigError that shows an example if it is not set."""
        self._require_readable(key)
        if not self.tree.get(key):
            raise ConfigError(f"{key} is missing: add {key}=..., for example {key}={TOP[key]}")
        return absolute_url(self.tree[key], key)

    def only(self, keys: Iterable[str]) -> "Recipe":
        """Return a copy of which only these sections and addresses can be read: those that the table STEPS declares for a step."""
        part = copy.copy(self)
        part._readable = frozenset(keys)
        return part

    def _require_readable(self, name: str) -> None:
        assert name in self._readable, f"the step reads {name!r} of the recipe, which its entry in the table STEPS does not declare"

    def resolved(self, sections: Iterable[str] = SECTIONS) -> Tree:
        """Return the whole tree with every default filled in, for the named sections."""
        top = {key: self.tree[key] for key in TOP if self.tree.get(key)}
        return top | {name: to_dict(getattr(self, name)) for name in sections}


def load_recipe(name: str | None = None, overrides: Iterable[str] = (), *, base: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of a file or shipped name (None: only defaults), updated with `base`, then with the overrides.

    Raises
    ------
    ConfigError
        Unknown recipe, key or kind, a value of the wrong type or out of its bounds.
    """
    file = read_recipe(name) if name is not None else {}
    before = _merge(file, base or {})
    tree = apply_overrides(before, overrides)
    try:
        return Recipe(tree)
    except ConfigError as error:
        raise ConfigError(f"{error}{_kind_note(before, tree)}") from None


def section_type(name: str, kind: str | None = None) -> type:
    """Return the spec class of a section; for source, model and backbone that of `kind`."""
    where = SECTIONS[name]
    if isinstance(where, Registry):
        return where.spec_type(kind or DEFAULT_KINDS[name])
    module, _, cls = where.partition(":")
    found: type = getattr(importlib.import_module(module), cls)
    return found


def build_section(name: str, given: Any) -> Any:
    """Validate one section; ConfigError names the dotted path of every wrong value."""
    if given is not None and not isinstance(given, dict):
        example = f"{name}.{dataclasses.fields(section_type(name))[-1].name}=..."
        raise ConfigError(f"{name} is {given!r} ({type(given).__name__}), expected a section, for example {example}")
    values, parts = dict(given or {}), SECTIONS[name]
    if isinstance(parts, Registry):
        kind = values.setdefault("kind", DEFAULT_KINDS[name])
        if not isinstance(kind, str):
            raise ConfigError(f"{name}.kind is {kind!r} ({type(kind).__name__}), expected one of {', '.join(parts.kinds())}")
        return build_spec(name, section_type(name, kind), values, functools.partial(_of_other_kinds, name, kind))
    return build_spec(name, section_type(name), values)


def _of_other_kinds(name: str, kind: str) -> dict[str, str]:
    return {key: note.removeprefix(" (of ").removesuffix(")") for key, note in _fields(name, kind).items() if note}


def _unknown(key: str, tree: Mapping[str, Any]) -> str:
    below = list(tree[key]) if isinstance(tree[key], dict) else []
    near = nearest_keys(key, below, {name: _fields(name, _kind(tree, name)) for name in SECTIONS}, TOP)
    if near:
        return f"unknown key {'.'.join([key, *below[:1]])!r}: did you mean {' or '.join(near)}?"
    return f"unknown key {key!r}{did_you_mean(key, [*TOP, *SECTIONS])}"


def _fields(name: str, kind: str | None) -> dict[str, str]:
    """Return the fields of a section of this kind, then those of other kinds only, each with a note that names these kinds."""
    found = {field.name: "" for field in dataclasses.fields(section_type(name, kind))}
    known, others = SECTIONS[name], dict[str, list[str]]()
    for other in known.kinds() if isinstance(known, Registry) else ():
        for field in dataclasses.fields(section_type(name, other)):
            others.setdefault(field.name, []).append(other)
    return {field: f" (of {name}.kind={', '.join(kinds)})" for field, kinds in others.items()} | found


def _kind(tree: Mapping[str, Any], name: str) -> str | None:
    section = tree.get(name)
    kind = section.get("kind") if isinstance(section, dict) else None
    known = SECTIONS[name]
    return kind if isinstance(known, Registry) and kind in known.kinds() else None


def _kind_note(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    for name in DEFAULT_KINDS:
        old, new = _kind(before, name), _kind(after, name)
        if old and new and old != new:
            return (
                f"\n{name}.kind was changed from {old!r} to {new!r}, and the recipe's other {name} keys stayed: "
                f"replace the whole section, '{name}={{kind: {new}}}'"
            )
    return ""


def _merge(tree: Mapping[str, Any], top: Mapping[str, Any]) -> Tree:
    out = dict(tree)
    for key, value in top.items():
        inner = out.get(key)
        out[key] = _merge(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return out
