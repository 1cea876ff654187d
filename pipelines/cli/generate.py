"""`aepipe sample` and `aepipe decode`: a section of a recipe in, files out, in this process (on its GPU with cluster.use_gpu=true)."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from aecore.artifact.documents import CLAIM, read_json
from aecore.data.dataset import open_dataset
from aecore.errors import AecoreError, ConfigError, did_you_mean
from aecore.store import absolute_url, open_store
from pipelines.cli import text
from pipelines.cli.arguments import Args, Result
from pipelines.cli.overrides import require_no_conflict
from pipelines.recipe.recipe import SECTIONS, TOP, Recipe, load_recipe, section_type
from pipelines.recipe.yaml import Tree, apply_overrides


def sample(args: Args) -> Result:
    """Draw from the prior of `args.run` into `args.out`; `num=16` is short for `sample.num=16`."""
    from aecore.sampling import sample_run

    recipe = _recipe("sample", args, {"run": args.run, "out": args.out})
    return _run("sample", args, recipe, lambda **how: sample_run(recipe.require("run"), recipe.require("out"), recipe.sample, **how))


def decode(args: Args) -> Result:
    """Decode the latents `args.latents` with `args.run` into `args.out`; `label=3` is short for `decode.label=3`."""
    from aecore.sampling import decode_run

    recipe, latents = _recipe("decode", args, {"run": args.run, "out": args.out}), absolute_url(args.latents, "the latents")
    return _run(
        "decode", args, recipe, lambda **how: decode_run(recipe.require("run"), latents, recipe.require("out"), recipe.decode, **how)
    )


def _recipe(section: str, args: Args, base: Mapping[str, Any]) -> Recipe:
    names = {field.name for field in dataclasses.fields(section_type(section))}
    for key in (word.partition("=")[0] for word in args.overrides):
        if "." not in key and key not in {*names, *TOP, *SECTIONS}:
            raise ConfigError(f"unknown key {key!r}{did_you_mean(key, names)}: `aepipe {section}` takes these and recipe sections")
    words = [f"{section}.{word}" if word.partition("=")[0] in names else word for word in args.overrides]
    _require_class_id(apply_overrides({}, words).get(section), args.run)
    require_no_conflict(base, words)
    recipe = load_recipe(args.recipe, words, base=base)
    if recipe.cluster.kind != "local":
        raise ConfigError(
            f"cluster.kind={recipe.cluster.kind}, and `aepipe {section}` works in this process: set cluster.kind=local, or run it there"
        )
    return recipe


def _require_class_id(given: Any, run: str) -> None:
    """ConfigError that lists the classes if the label is a word; their names are read from the run's dataset, if it still exists."""
    label = given.get("label") if isinstance(given, Mapping) else None
    if not isinstance(label, str):
        return
    names: tuple[str, ...] = ()
    with contextlib.suppress(AecoreError):
        info = read_json(open_store(run), CLAIM)["info"]
        names = open_dataset(info["data"], info["dataset_number"]).manifest.classes
    known = ", ".join(f"{number} {name}" for number, name in enumerate(names)) or "class_names of `aepipe show DATASET`, counted from 0"
    hint = f"; write label={names.index(label)}" if label in names else ""
    raise ConfigError(f"label is {label!r}, expected the number of a class: {known}{hint}")


def _run(name: str, args: Args, recipe: Recipe, call: Any) -> Result:
    import torch

    from pipelines.cluster.session import require_gpu_is_there

    started, cluster = time.perf_counter(), recipe.cluster
    require_gpu_is_there(cluster)
    torch.set_num_threads(cluster.threads_per_worker)
    made = call(device="cuda" if cluster.use_gpu else "cpu", dry_run=args.dry_run)
    summary: Tree = {"step": name, **made, "dry_run": args.dry_run, "seconds": round(time.perf_counter() - started, 2)}
    if args.dry_run:
        summary["recipe"] = recipe.resolved((name, "cluster"))
    return Result(summary, text.of_step)
