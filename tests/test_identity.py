"""A field that is added later changes no identity while it says what older versions did: laws over every spec and every identity."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aecore.artifact.commit import require_same
from aecore.checkpoint.config import ModelConfig
from aecore.data.format.transform import TransformSpec, preprocessing_sha256
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.encoding.job import EncodeSpec, _identity, encode_dataset
from aecore.errors import ConfigError
from aecore.nn.mlp import MLPSpec
from aecore.registry import BACKBONES, MODELS, SOURCES, Registry, absent_values, as_recorded, knob, spec, to_dict
from aecore.sampling import SampleSpec, sample_run
from aecore.store import sha256_json
from aecore.training.job import TrainJob
from aecore.training.loop import fit
from aecore.variational import VAESpec
from pipelines.recipe.recipe import SECTIONS, Recipe, section_type
from pipelines.steps.steps import STEPS
from pipelines.steps.submit import job_of
from tests.documents import content
from tests.fixtures.make_v1 import job, write_images

V1 = Path(__file__).parent / "fixtures/v1"
SPECS = [
    (name, part)
    for name, where in SECTIONS.items()
    for part in ([where.spec_type(kind) for kind in where.kinds()] if isinstance(where, Registry) else [section_type(name)])
    if any(field.metadata.get("identity", True) for field in dataclasses.fields(part))
]
JOB_PARTS = ("model", "backbone", "transform", "optim", "train", "checkpoint", "input", "pairs")


def with_later(part: type, default: str = "old", **options: Any) -> type:
    """Return the spec class with one more field, as version 2 would add it."""
    fields = {"__annotations__": {"later": str}, "later": knob(default, "a later field", since=2, **options), "__module__": __name__}
    return spec(type(part.__name__, (part,), fields))


def sha256(part: Any) -> str:
    return sha256_json(to_dict(part, identity_only=True))


@pytest.mark.parametrize(("name", "part"), SPECS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_later_field_changes_no_identity_at_the_old_value_and_every_one_at_another(name, part):
    known, later, better = part(), with_later(part), with_later(part, "new", absent="old")
    assert sha256(later()) == sha256(known)
    assert sha256(better(later="old")) == sha256(known)
    assert len({sha256(later(later="new")), sha256(better()), sha256(known)}) == 2
    assert to_dict(later())["later"] == "old"  # shown and sent whole
    assert as_recorded(better(), to_dict(known, identity_only=True)) == better(later="old")
    assert as_recorded(better(), to_dict(better(), identity_only=True)) == better()
    assert as_recorded(better(later="odd"), to_dict(known, identity_only=True)).later == "odd"


def test_inside_a_spec_the_same_holds():
    @spec
    class Inner:
        width: int = knob(3, "width")

    @spec
    class Outer:
        inner: Any = knob(Inner(), "inner")

    later = with_later(Inner, "new", absent="old")
    recorded = to_dict(Outer(), identity_only=True)
    assert to_dict(Outer(inner=later(later="old")), identity_only=True) == recorded == {"inner": {"width": 3}}
    assert to_dict(Outer(inner=later()), identity_only=True) == {"inner": {"width": 3, "later": "new"}}
    assert as_recorded(Outer(inner=later()), recorded).inner.later == "old"
    assert absent_values(Outer(inner=later())) == {"inner": {"later": "old"}}


def test_a_difference_in_a_later_field_names_the_old_value_that_its_absence_means():
    with pytest.raises(ConfigError, match=r"transform\.pixels: there 1, asked 2\n"):
        require_same("out", "run", {"transform": {"pixels": 2}}, {"transform": {}}, absent={"transform": {"pixels": 1}})
    with pytest.raises(ConfigError, match=r"transform\.pixels: there 2, asked 1\n"):
        require_same("out", "run", {"transform": {}}, {"transform": {"pixels": 2}}, absent={"transform": {"pixels": 1}})
    require_same("out", "run", {"transform": {"pixels": 1}}, {"transform": {}}, absent={"transform": {"pixels": 1}})


@pytest.mark.parametrize("name", JOB_PARTS)
def test_the_identity_of_a_run_and_the_config_of_a_checkpoint_follow_the_rule(name):
    plain = TrainJob("data", "out", VAESpec(), MLPSpec())
    dataset: Any = SimpleNamespace(training_key=lambda split: f"key of {split}")

    def identities(asked):
        config = ModelConfig(asked.model, asked.backbone, asked.transform, (1, 8, 8)).to_dict()
        return asked.identity(dataset, None), config, preprocessing_sha256(asked.transform)

    old, new = (dataclasses.replace(plain, **{name: with_later(type(getattr(plain, name)))(later=value)}) for value in ("old", "new"))
    assert identities(old) == identities(plain)
    assert identities(new)[0] != identities(plain)[0]
    assert (identities(new)[1] != identities(plain)[1]) == (name in ("model", "backbone", "transform"))
    assert (identities(new)[2] != identities(plain)[2]) == (name == "transform")


@pytest.mark.parametrize("name", ["encode", "transform"])
def test_the_identity_of_a_table_follows_the_rule(name):
    def identity(transform=None, asked=None):
        loaded: Any = SimpleNamespace(sha256="c", config=ModelConfig(VAESpec(), MLPSpec(), transform or TransformSpec(), (1, 8, 8)))
        return _identity(loaded, asked or EncodeSpec(), {"mu": 2})

    known = identity()
    before = {"checkpoint_sha256", "preprocessing", "columns", "dtype", "batch", "rows_per_part", "seed"}
    assert set(identity(asked=EncodeSpec(bits=1, columns=("metadata",)))) == before, "of tables that exist"
    assert set(known) == before | {"bits", "index_columns"}
    old, new = (
        identity(with_later(TransformSpec)(later=value)) if name == "transform" else identity(asked=with_later(EncodeSpec)(later=value))
        for value in ("old", "new")
    )
    assert old == known != new


@pytest.mark.parametrize(
    ("step", "section"), [(name, section) for name, step in STEPS.items() for section in step.sections if section != "cluster"]
)
def test_the_key_of_a_ray_job_follows_the_rule(step, section):
    tree = {"source": {"url": "/in"}, "data": "/data", "run": "/run", "out": "/out"}

    def key(**parts):
        recipe = Recipe(tree)
        recipe._sections.update(parts)
        return job_of(step, recipe).key

    part = type(getattr(Recipe(tree), section))
    assert key(**{section: with_later(part)()}) == key()
    assert key(**{section: with_later(part)(later="new")}) != key()


def test_a_config_without_a_later_field_means_what_older_versions_did(monkeypatch):
    better = (
        with_later(VAESpec, "new", absent="old"),
        with_later(MLPSpec, "new", absent="old"),
        with_later(TransformSpec, "new", absent="old"),
    )
    recorded = ModelConfig(VAESpec(), MLPSpec(), TransformSpec(), (1, 8, 8)).to_dict()
    for registry, part in ((MODELS, better[0]), (BACKBONES, better[1])):
        registry.kinds()
        monkeypatch.setitem(registry._parts, part().kind, (part, registry._parts[part().kind][1]))
    monkeypatch.setattr("aecore.checkpoint.config.TransformSpec", better[2])
    config = ModelConfig.from_dict(recorded)
    assert [config.model.later, config.backbone.later, config.transform.later] == ["old"] * 3
    assert config.to_dict() == recorded
    new = ModelConfig(better[0](), better[1](), better[2](), (1, 8, 8))
    assert ModelConfig.from_dict(json.loads(json.dumps(new.to_dict()))) == new


@pytest.fixture
def v1(tmp_path):
    return Path(shutil.copytree(V1, tmp_path / "v1"))


def better(asked: Any, **changes: Any) -> Any:
    """Return a spec as it would be if its class had a later field with a better default."""
    values = {field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)}
    return with_later(type(asked), "new", absent="old")(**values, **changes)


def test_a_dataset_of_the_version_before_is_appended_to_and_finished_after_every_default_changed(v1):
    source = better(FolderSpec(url=str(v1 / "images")))
    write_images(v1 / "images", "train", range(20, 21))
    manifest = shard_dataset(source, str(v1 / "dataset"), better(SplitSpec()), better(ShardSpec(max_samples=8)))
    assert manifest.number == 3
    assert manifest.identity == json.loads((V1 / "dataset/dataset.000002.json").read_bytes())["identity"]
    with pytest.raises(ConfigError) as error:
        shard_dataset(source, str(v1 / "dataset"), better(SplitSpec()), better(ShardSpec(max_samples=8), later="odd"))
    assert "shards.later: there 'old', asked 'odd'" in str(error.value)
    for number in (6, 7, 20):
        for animal in ("cat", "dog"):
            (v1 / f"images/train/{animal}/{number}.png").unlink()
    shard_dataset(source, str(v1 / "unfinished-dataset"), better(SplitSpec()), better(ShardSpec(max_samples=8)))
    assert not (v1 / "unfinished-dataset/run.000002.json").exists()  # the claim that was there goes on
    fresh = shard_dataset(source, str(v1 / "new"), better(SplitSpec()), better(ShardSpec(max_samples=8)))
    assert [fresh.identity[name]["later"] for name in ("source", "splits", "shards")] == ["new"] * 3


def test_a_run_of_the_version_before_is_resumed_after_every_default_changed(v1):
    asked = dataclasses.replace(job("unfinished-run", 3), data=str(v1 / "dataset"), out=str(v1 / "unfinished-run"))
    asked = dataclasses.replace(asked, **{name: better(getattr(asked, name)) for name in JOB_PARTS})
    assert fit(asked).step == 9
    assert content(v1 / "unfinished-run/model/config.json") == content(V1 / "run/model/config.json")
    for name in JOB_PARTS:
        with pytest.raises(ConfigError) as error:
            fit(dataclasses.replace(asked, **{name: better(getattr(job("", 3), name), later="odd")}))
        assert f"{name}.later: there 'old', asked 'odd'" in str(error.value)


def test_tables_and_samples_of_the_version_before_go_on_after_every_default_changed(v1):
    run, data = str(v1 / "run"), str(v1 / "dataset")
    assert encode_dataset(run, data, str(v1 / "table"), better(EncodeSpec(batch=4, kl=True))).number == 2
    assert encode_dataset(run, data, str(v1 / "unfinished-table"), better(EncodeSpec(batch=4, sample=True))).number == 1
    assert encode_dataset(run, data, str(v1 / "new"), better(EncodeSpec(batch=4))).identity["later"] == "new"
    with pytest.raises(ConfigError, match="later: there 'old', asked 'odd'"):
        encode_dataset(run, data, str(v1 / "table"), better(EncodeSpec(batch=4, kl=True), later="odd"))
    assert sample_run(run, str(v1 / "samples"), better(SampleSpec(num=3, images=1)))["made"] == 0
    with pytest.raises(ConfigError, match=r"sample\.later: there 'old', asked 'odd'"):
        sample_run(run, str(v1 / "samples"), better(SampleSpec(num=3, images=1), later="odd"))


def test_sources_of_every_kind_are_covered():
    assert {part for name, part in SPECS if name == "source"} == {SOURCES.spec_type(kind) for kind in SOURCES.kinds()}
