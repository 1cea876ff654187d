"""The recipe tree: one object from YAML, command line and JSON, and errors that name path, value and the nearest known key."""

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aecore.errors import ConfigError, similar
from aecore.registry import Registry
from pipelines.recipe.recipe import SECTIONS, Recipe, load_recipe, section_type
from pipelines.recipe.yaml import _Loader, apply_overrides, parse_yaml, shipped_recipes
from pipelines.steps.steps import with_absolute_urls

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="ascii"))
)
SECTION = st.dictionaries(st.text("abc", min_size=1), SCALARS)
TREES = st.dictionaries(st.text("abcxyz_", min_size=1), SCALARS | st.lists(SCALARS, max_size=3) | SECTION)


class Dumper(yaml.SafeDumper):
    """Quotes text that `parse_yaml` would read as a number."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


@given(TREES)
def test_a_tree_written_as_yaml_is_read_back_equal(tree: dict) -> None:
    assert parse_yaml(yaml.dump(tree, Dumper=Dumper, sort_keys=False), "here") == tree


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_valid_and_survive_json(name: str) -> None:
    recipe = load_recipe(name, ["out=./out"])
    again = Recipe(json.loads(json.dumps(recipe.resolved())))
    assert again.resolved() == recipe.resolved()
    assert Recipe(with_absolute_urls(recipe)).resolved()["train"] == recipe.resolved()["train"]


def test_defaults_give_way_to_the_file_and_the_file_to_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {epochs: 7, global_batch: 32}\noptim: {lr: 1e-2}\n")
    recipe = load_recipe(str(file), ["train.epochs=3", "optim.clip=.5", "backbone.hidden=[8, 4]"])
    assert (recipe.train.epochs, recipe.train.global_batch, recipe.train.seed) == (3, 32, 0)
    assert (recipe.optim.lr, recipe.optim.clip, recipe.backbone.hidden) == (0.01, 0.5, (8, 4))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown key 'train.epoch' \(did you mean 'train.epochs'\?"),
        ("train.ema=1", r"unknown key 'train.ema' \(known: train.block, "),
        ("cluster.gpu=true", r"unknown key 'cluster.gpu' \(did you mean 'cluster.use_gpu'\?"),
        ("train.batch_size=3", r"unknown key 'train.batch_size' \(did you mean 'train.global_batch'\?"),
        ("schedule.timezone=Berlin", r"^schedule.timezone is 'Berlin', which is no time zone: did you mean Europe/Berlin\?$"),
        ("schedule.timezone=New York", r"no time zone: did you mean America/New_York\?$"),
        ("schedule.timezone=Europe/Berlni", r"no time zone: did you mean Europe/Berlin\?$"),
        ("schedule.timezone=Middle-earth", r"no time zone: expected an IANA name such as Europe/Berlin$"),
        ("traen.epochs=3", r"unknown key 'traen.epochs': did you mean train.epochs\?"),
        ("split.test=0.1", r"unknown key 'split.test': did you mean splits.test\?"),
        ("backbon.hiden=[1]", r"unknown key 'backbon.hiden': did you mean backbone.hidden\?"),
        ("cell=lstm", r"unknown key 'cell': did you mean backbone.cell \(of backbone.kind=.*recurrent"),
        ("batch_size=32", r"unknown key 'batch_size': did you mean .*train.global_batch or"),
        ("nets.hidden=[1]", r"unknown key 'nets.hidden': did you mean backbone.hidden\?"),
        ("outt=x", r"unknown key 'outt': did you mean out\?"),
        ("zzz=1", r"unknown key 'zzz' \(known: about, backbone, "),
        (
            "backbone={kind: mlp, hidden: [128}",
            r"(?s)the value of backbone is not valid YAML: .*expected ',' or '\]', but got '\}'",
        ),
        ("backbone.hidden=[128", r"the value of backbone.hidden is not valid YAML"),
        ("lr=1e-3", r"unknown key 'lr': did you mean optim.lr\?"),
        ("model.kind=vea", r"unknown model kind 'vea' \(did you mean 'vae'\?"),
        ("source.kind=floder", r"unknown source kind 'floder' \(did you mean 'folder'\?"),
        ("train.epochs=three", r"train.epochs is 'three' \(str\), expected a valid integer"),
        ("train.epochs=1.5", r"train.epochs is 1.5 \(float\), expected a valid integer"),
        ("train.epochs=true", r"train.epochs is True \(bool\), expected a valid integer"),
        ('train.epochs="3"', r"train.epochs is '3' \(str\), expected a valid integer"),
        ("train.epochs=0", r"train.epochs is 0, expected >= 1"),
        ("optim.lr=-1e-3", r"optim.lr is -0.001, expected > 0"),
        ("backbone.hidden=[8, x]", r"backbone.hidden.1 is 'x' \(str\), expected a valid integer"),
        ("train.precision=fp8", r"train.precision is 'fp8' \(str\), expected 'fp32' or 'bf16'"),
        ("train=3", r"train is 3 \(int\), expected a section"),
        ("train.epochs.more=3", r"sets a key below train.epochs, but train.epochs is 5, not a section"),
        ("optim.lr=.inf", r"optim.lr is inf, expected a finite number"),
        ("optim.clip=.nan", r"optim.clip is nan, expected a finite number"),
        ("optim.weight_decay=1e999", r"optim.weight_decay is inf, expected a finite number"),
        ("cluster.resources_per_worker={CPU: .inf}", r"cluster.resources_per_worker is inf, expected a finite number"),
        ("cluster.num_workers=-1", r"cluster.num_workers is -1, expected >= 0"),
    ],
)
def test_a_bad_value_is_refused_with_its_path_and_what_was_expected(override: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {epochs: 5}\n")
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(file), [override])


def test_all_problems_of_a_section_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)train.epochs is 'x'.*train.lanes is 'y'"):
        load_recipe(None, ["train.epochs=x", "train.lanes=y"])


def test_another_kind_does_not_inherit_the_files_keys_silently() -> None:
    with pytest.raises(ConfigError, match=r"(?s)unknown key 'model.beta'.*changed from 'vae' to 'ae'.*'model=\{kind: ae\}'"):
        load_recipe(None, ["model.kind=ae"], base={"model": {"kind": "vae", "beta": 4.0}})
    assert load_recipe(None, ["model={kind: ae}"], base={"model": {"kind": "vae", "beta": 4.0}}).model.kind == "ae"


def test_what_is_missing_is_asked_for_with_an_example() -> None:
    with pytest.raises(ConfigError, match=r"data is missing: add data=..., for example data=./dataset"):
        load_recipe(None, ["out=./x"]).require("data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "is not valid YAML"),
        ("train: {epochs: 1, epochs: 2}", "the key 'epochs' occurs twice"),
        ("- 1\n- 2", "holds list, expected sections"),
        ("name: &a [*a]", "the anchor or alias 'a' is not read: write the value out"),
        ("name: a\ntrain: &a {epochs: 1}", "(?s)the anchor or alias 'a' is not read.*line 2"),
        ("name: a\n2026: 3", r"bad.yaml, line 2: the key 2026 is not text but of type int"),
        ("train:\n  null: 3", r"line 2: the key null is not text but of type null"),
        ("train:\n  yes: 3", r"line 2: the key yes is not text but of type bool"),
        ("train: {<<: {epochs: 1}}", r"the key << is not text but of type merge"),
        ("train:\n  epochs: 1:30", r"line 2: 1:30 is 90 in YAML 1.1 \(digits to base 60\): write 90, or put it in quotes"),
        ("optim: {lr: 1:30.5}", r"1:30.5 is 90.5 in YAML 1.1 \(digits to base 60\)"),
        ("train: {seed: 010}", r"010 is 8 in YAML 1.1 \(octal digits\): write 8,"),
        *((f"run: a\nname: {word}", rf"line 2: {word} is (true|false) in YAML 1.1 \(a boolean\)") for word in ("yes", "NO", "On", "off")),
        ("name: !!binary aGk=", "is not valid YAML"),
        ("name: !!set {a}", "is not valid YAML"),
        ("train: {epochs: !!int x}", "is YAML, but not plain data"),
        pytest.param("name: " + "[" * 1100, "nested more than 32 levels deep", id="deep"),
        ("train: !!python/object/apply:os.system [echo]", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(file))


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'mnist_vea'.*did you mean 'mnist_vae'\?"):
        load_recipe("mnist_vea")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("3", 3),
        ("null", None),
        ("[1, a]", [1, "a"]),
        ("a: b: c", "a: b: c"),
        ("*.png", "*.png"),
        ("&", "&"),
        ("=", "="),
        ("2026-13-45", "2026-13-45"),
        ("2026-01-01 10:00:00", "2026-01-01 10:00:00"),
        ("host:8080", "host:8080"),
        ("08", "08"),
        ("'yes'", "yes"),
        ("#204080", "#204080"),
        (" #fff", "#fff"),
        ("my photos #3/a b", "my photos #3/a b"),
        ("a#b", "a#b"),
        ("# text", "# text"),
        ("'#204080'", "#204080"),
        ("['#1', \"x #2\"]", ["#1", "x #2"]),
        ("a: 1  # one\nb: 2", {"a": 1, "b": 2}),
        ("!!str 010", "010"),
    ],
)
def test_override_values_are_yaml(text: str, value: object) -> None:
    assert apply_overrides({}, [f"a.b={text}"]) == {"a": {"b": value}}


@pytest.mark.parametrize("text", ['"a" # of it', "'a # b' # c", "'#1' #2", "[a, b] # c", "{a: 1} # c", "'a'  #"])
def test_a_comment_after_a_value_is_refused_and_not_dropped(text: str) -> None:
    comment = text[text.rindex("#") :]
    with pytest.raises(
        ConfigError, match=f"^the value of a.b has a comment .'{comment}'.: leave it out, or put all of the value in quotes"
    ):
        apply_overrides({}, [f"a.b={text}"])


@pytest.mark.parametrize("text", ["yes", "[a, off]", "010", "1:30", "{a: 1:30}", "{1: a}", "{a: 1, a: 2}"])
def test_an_override_that_is_not_what_it_looks_like_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^train.seed: "):
        load_recipe(None, [f"train.seed={text}"])


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("[*_seg.png,thumbs]", '["*_seg.png", thumbs]'),
        ("[#fff, 'x]", '"[#fff, \'x]"'),
        ("[&a, @b, c d]", '["&a", "@b", c d]'),
        ("[a-z]*.png", '"[a-z]*.png"'),
        ("{00..02}.tar", '"{00..02}.tar"'),
        ("{a: *b}", '"{a: *b}"'),
        (" [ab", '"[ab"'),
    ],
)
def test_an_override_that_begins_like_a_list_and_is_none_shows_the_quotes(value: str, quoted: str) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML") as refused:
        apply_overrides({}, [f"source.exclude={value}"])
    shown = shlex.split(str(refused.value).partition("for example ")[2])
    assert shown == [f"source.exclude={quoted}"], "the shell removes its own quotes"
    expected = ["*_seg.png", "thumbs"] if "thumbs" in value else ["&a", "@b", "c d"] if "@" in value else value.strip()
    assert apply_overrides({}, shown) == {"source": {"exclude": expected}}


def test_a_colour_is_text_on_the_command_line_and_needs_quotes_in_a_recipe(tmp_path: Path) -> None:
    assert load_recipe(None, ["shards.mode=RGB", "shards.background=#204080"]).shards.background == "#204080"
    (tmp_path / "mine.yaml").write_text("shards:\n  background: #204080\n")
    with pytest.raises(ConfigError, match=r"background is None .*in a recipe, text that begins with # needs quotes"):
        load_recipe(str(tmp_path / "mine.yaml")).shards  # noqa: B018  # sections are validated at their first use


def test_addresses_stay_text_and_travel_absolute() -> None:
    recipe = load_recipe(None, ["out=2026", "source.url=./raw"])
    assert recipe.tree["out"] == "2026"
    assert with_absolute_urls(recipe) == {"out": str(Path("2026").absolute()), "source": {"url": str(Path("raw").absolute())}}


@pytest.mark.parametrize(("given", "absolute"), [("names.txt", str(Path("names.txt").absolute())), ("[cat, 7]", ["cat", 7])])
def test_the_file_of_the_classes_is_found_from_another_folder_and_a_list_stays_one(given: str, absolute: Any) -> None:
    recipe = load_recipe(None, ["source.kind=folder", f"source.classes={given}"])
    tree = with_absolute_urls(recipe)
    assert tree["source"]["classes"] == absolute
    assert Recipe(tree).source.classes == (tuple(absolute) if isinstance(absolute, list) else absolute)


def test_an_address_that_runs_a_command_is_refused() -> None:
    with pytest.raises(ConfigError, match="would run a command"):
        load_recipe(None, ["out=pipe:rm"]).require("out")


def test_parsing_a_shard_recipe_imports_no_torch() -> None:
    code = """
import sys
from pipelines.recipe.recipe import load_recipe
recipe = load_recipe(None, ["source.kind=sprites"])
recipe.source, recipe.shards, recipe.splits
print([name for name in ("torch", "ray", "prefect") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_section_has_defaults() -> None:
    assert set(Recipe({}).resolved()) == set(SECTIONS)


KEYS = [
    (section, part, field.name)
    for section, where in SECTIONS.items()
    for part in ([where.spec_type(kind) for kind in where.kinds()] if isinstance(where, Registry) else [section_type(section)])
    for field in dataclasses.fields(part)
]


def one_typo(name: str) -> Iterator[str]:
    """Give the name with a letter missing, doubled, wrong or swapped with the next one, at every place."""
    for at in range(len(name)):
        yield name[:at] + name[at + 1 :]
        yield name[:at] + name[at] + name[at:]
        yield name[:at] + "q" + name[at + 1 :]
        yield name[:at] + name[at : at + 2][::-1] + name[at + 2 :]


def test_every_key_with_one_typo_finds_that_key_or_another_that_is_as_close() -> None:
    for section, part, name in KEYS:
        fields = [field.name for field in dataclasses.fields(part)]
        for word in {*one_typo(name)} - {*fields, ""}:
            (found,) = similar(word, sorted(fields))
            assert found == name or word in {*one_typo(found)}, (section, name, word, found)
    with pytest.raises(ConfigError, match=r"unknown key 'optim.lrr' \(did you mean 'optim.lr'\?"):
        load_recipe(None, ["optim.lrr=1"])


def test_unrelated_words_find_no_key() -> None:
    words = ["ema", "banana", "turquoise", "zebra", "umbrella", "fjord", "quixotic", "wandb", "mixup"]
    for section, part, _ in KEYS:
        fields = [field.name for field in dataclasses.fields(part)]
        for word in words:
            assert similar(word, fields) == [], (section, word)
