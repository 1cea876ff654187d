"""Laws of the table of steps: what decides a job, which keys are addresses, and that every step has its flow and its deployment."""

import dataclasses
import functools
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from aecore.registry import Registry, field_types
from pipelines.cli import text
from pipelines.cluster.jobs import JobServer
from pipelines.recipe.recipe import SECTIONS, TOP, Recipe, load_recipe, section_type
from pipelines.recipe.yaml import Tree, apply_overrides, value_at
from pipelines.steps.pipeline import PIPELINE, sections_and_addresses, stage
from pipelines.steps.steps import ADDRESSES, STEPS, with_absolute_urls
from pipelines.steps.submit import job_of
from tests.knobs import Values, changes

NAMES = (*STEPS, PIPELINE)
JOB = {"kind": "job", "address": "http://127.0.0.1:8265"}
BASE: Tree = {"name": "x", "run": "/x/run", "out": "/x/out", "cluster": JOB}
HERE = "cluster.num_workers=0"


def base(name: str) -> Tree:
    """Return a recipe that every step can take; a pipeline with `data` shards nothing."""
    return BASE if name in (PIPELINE, "shard", "adopt") else BASE | {"data": "/x/data"}


def key(name: str, tree: Tree) -> str:
    return job_of(name, Recipe(tree)).key


def read_sections(name: str) -> list[str]:
    return sections_and_addresses(name, Recipe(base(name)))[0]


def read_addresses(name: str) -> list[str]:
    return sections_and_addresses(name, Recipe(base(name)))[1]


def kinds(section: str) -> list[str | None]:
    parts = SECTIONS[section]
    return list(parts.kinds()) if isinstance(parts, Registry) else [None]


@functools.cache
def knobs(section: str) -> list[tuple[dataclasses.Field[Any], Values, Values]]:
    """Return every knob of every kind of a section, with the section before and after it is changed."""
    named = {kind: {} if kind is None else {"kind": kind} for kind in kinds(section)}
    every = [(kind, *change) for kind in named for change in changes(section_type(section, kind))]
    return [(field, named[kind] | before, named[kind] | after) for kind, field, before, after in every]


def is_identity(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata["identity"])


@pytest.mark.parametrize(("name", "section"), [(name, section) for name in NAMES for section in read_sections(name)])
def test_every_identity_knob_that_a_step_reads_makes_another_job(name: str, section: str) -> None:
    checked = 0
    for field, before, after in knobs(section):
        if is_identity(field):
            checked += 1
            assert key(name, base(name) | {section: before}) != key(name, base(name) | {section: after}), f"{section}.{field.name}"
    of_kinds = {key(name, base(name) | {section: {"kind": kind}}) for kind in kinds(section) if kind is not None}
    assert len(of_kinds) == len([kind for kind in kinds(section) if kind is not None]), "each kind is another job"
    assert checked or section in ("about", "checkpoint"), "a section without any identity knob decides nothing"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_cannot_change_what_a_step_makes_makes_another_job(name: str) -> None:
    same = key(name, base(name))
    assert key(name, base(name) | {"name": "another"}) == same
    for section in SECTIONS:
        if section == "cluster":
            continue
        for field, before, after in knobs(section):
            if section not in read_sections(name) or not (is_identity(field) or f"{section}.{field.name}" in read_addresses(name)):
                assert key(name, base(name) | {section: before}) == key(name, base(name) | {section: after}), f"{section}.{field.name}"
    for more in (
        {"num_workers": 7},
        {"python": "/p"},
        {"timeout_s": 5.0},
        {"use_gpu": True},
        {"shared_paths": ["/x"]},
        {"threads_per_worker": 3},
    ):
        assert key(name, base(name) | {"cluster": JOB | more}) == same, more


@pytest.mark.parametrize("name", NAMES)
def test_the_addresses_that_a_step_reads_decide_its_job_and_the_others_do_not(name: str) -> None:
    for address in ADDRESSES:
        trees = [apply_overrides(base(name), [f"{address}=/{place}"]) for place in ("one", "two")]
        assert (len({key(name, tree) for tree in trees}) == 2) == (address in read_addresses(name)), address
        for tree, place in zip(trees, ("/one", "/two"), strict=True):
            assert (place in job_of(name, Recipe(tree)).urls) == (address in read_addresses(name)), address


def test_a_pipeline_that_is_given_a_dataset_is_not_decided_by_a_source() -> None:
    given = BASE | {"data": "/x/data"}
    assert key(PIPELINE, given) == key(PIPELINE, given | {"source": {"kind": "folder", "url": "/raw"}, "shards": {"max_samples": 7}})
    assert key(PIPELINE, BASE) != key(PIPELINE, BASE | {"shards": {"max_samples": 7}})
    assert key(PIPELINE, BASE) != key(PIPELINE, given) != key(PIPELINE, given | {"train": {"epochs": 3}})


@pytest.mark.parametrize("name", STEPS)
def test_what_is_outside_of_the_identity_and_could_be_an_address_is_named_as_one(name: str) -> None:
    assert set(STEPS[name].sections) < set(SECTIONS)
    assert {address.partition(".")[0] for address in STEPS[name].addresses} <= {*TOP, *STEPS[name].sections}
    for section in STEPS[name].sections:
        for cls in (section_type(section, kind) for kind in kinds(section)):
            if cls.__module__.startswith("tests."):  # a kind that another test registered
                continue
            texts = [field for field in dataclasses.fields(cls) if field_types(cls)[field.name] in (str, str | None)]
            for field in texts:
                address = f"{section}.{field.name}" in STEPS[name].addresses
                if section == "about" or f"{section}.{field.name}" == "source.name":  # looked up nowhere
                    continue
                assert address != is_identity(field), f"{section}.{field.name}: part of the identity, or an address in STEPS"
                assert not address or not field.default, "an address has no default: what is not given is not looked up"


def test_every_address_of_a_recipe_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tree = apply_overrides({}, [f"{address}=./{number}" for number, address in enumerate(ADDRESSES)])
    absolute = with_absolute_urls(Recipe(tree))
    assert [value_at(absolute, address) for address in ADDRESSES] == [f"{tmp_path}/{number}" for number, _ in enumerate(ADDRESSES)]
    assert with_absolute_urls(Recipe(absolute)) == absolute
    seen = []
    step = dataclasses.replace(STEPS["train"], run=lambda recipe, *_, **__: seen.append(recipe.train.init_from) or {})
    step(load_recipe(None, ["train.init_from=./other"]))
    assert seen == [f"{tmp_path}/other"], "workers have another working directory"


def test_figures_on_this_machine_are_refused_for_a_head_elsewhere() -> None:
    from aecore.errors import ClusterError

    server = object.__new__(JobServer)
    recipe = Recipe(
        {
            "run": "s3://bucket/run",
            "data": "s3://bucket/data",
            "evaluate": {"figures": "/here/figures"},
            "cluster": {"kind": "job", "address": "http://192.0.2.77:8265"},
        }
    )
    server._cluster, server._host = recipe.cluster, "192.0.2.77"
    with pytest.raises(ClusterError, match="/here/figures is a path on this machine"):
        server._require_urls_fit(job_of("evaluate", recipe))


@pytest.fixture(scope="module")
def places(sprites: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Give for every step the words with which its dry run works."""
    run = str(tmp_path_factory.mktemp("steps") / "run")
    tiny = ["model.latent_dim=2", "backbone.hidden=[8]", "train.epochs=1", "train.global_batch=128", HERE]
    STEPS["train"](load_recipe(None, [f"data={sprites}", f"out={run}", *tiny]))
    out = f"out={run}-nothing"
    return {
        "shard": ["source.kind=sprites", "source.num_samples=10", out, HERE],
        "adopt": ["source.kind=webdataset", f"source.url={sprites}", "splits.by=none", out, HERE],
        "train": [f"data={sprites}", out, *tiny],
        "encode": [f"run={run}", f"data={sprites}", out, HERE],
        "evaluate": [f"run={run}", f"data={sprites}", HERE],
    }


@pytest.mark.parametrize("name", STEPS)
def test_a_step_reads_all_that_its_entry_names_and_cannot_read_anything_else(name: str, places: dict[str, list[str]]) -> None:
    step, recipe = STEPS[name], load_recipe(None, places[name])
    assert step(recipe, dry_run=True)["step"] == name
    for section in step.sections:
        less = dataclasses.replace(step, sections=tuple(known for known in step.sections if known != section))
        with pytest.raises(AssertionError, match=f"reads '{section}' of the recipe, which its entry .* does not declare"):
            less(recipe, dry_run=True)
    for address in (address for address in step.addresses if "." not in address):
        less = dataclasses.replace(step, addresses=tuple(known for known in step.addresses if known != address))
        with pytest.raises(AssertionError, match=f"reads '{address}' of the recipe"):
            less(recipe, dry_run=True)


@pytest.mark.parametrize("name", STEPS)
def test_a_stage_of_a_pipeline_is_given_what_its_step_reads(name: str) -> None:
    tree = stage(Recipe({"out": "/x", "run": "/other"}), name).tree
    made = {"data": "/x/dataset", "run": "/x/run"}
    assert {place: tree.get(place) for place in made} == {
        place: url if place in STEPS[name].addresses else None for place, url in made.items()
    }
    assert tree["out"] == ("/x" if STEPS[name].makes is None else f"/x/{STEPS[name].makes}")


def test_every_step_has_a_text_for_its_summary() -> None:
    assert set(STEPS) <= set(text._STEPS)


@pytest.mark.prefect
@pytest.mark.parametrize("name", NAMES)
def test_every_step_has_a_flow_a_cancellation_hook_and_a_deployment(name: str) -> None:
    from prefect.flows import load_flow_from_entrypoint

    from pipelines.deploy.recipes import MANUAL, deployments
    from pipelines.flows.factory import stop_job

    flow = getattr(import_module(f"pipelines.flows.{name}"), f"{name}_flow")
    assert flow.name == f"aepipe-{name}"
    assert flow.on_cancellation_hooks == [stop_job]
    assert list(inspect.signature(flow.fn).parameters) == ["recipe"]
    for recipe, named in ((load_recipe("demo", ["out=/x"]), "demo"), (None, MANUAL)):
        (made,) = [found for found in deployments(recipe) if found.full_name == f"aepipe-{name}/{named}"]
        assert made.entrypoint == f"pipelines.flows.{name}.{name}_flow", "servers keep this name"
        assert load_flow_from_entrypoint(made.entrypoint).name == flow.name
        assert recipe is None or Recipe(made.parameters["recipe"]).tree["out"].startswith("/x")
