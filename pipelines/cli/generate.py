"""`aepipe sample` and `aepipe decode`: a section of a recipe in, files out, in this process (on its GPU with cluster.use_gpu=true)."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from aecore.errors import ConfigError, did_you_mean
from aecore.store import absolute_url
from pipelines.cli import text
from pipelines.cli.arguments import Args, Result
from pipelines.cli.overrides import require_no_conflict, require_not_of_run
from pipelines.recipe.recipe import SECTIONS, TOP, Recipe, load_recipe, section_type
from pipelines.recipe.yaml import Tree


def sample(args: Args) -> Result:
    """Draw from the prior of `args.run` into `args.out`; `num=16` is short for `sample.num=16`."""
    from aecore.sampling import sample_run

    recipe = _recipe("sample", args, {"run": args.run, "out": args.out})
    return _run("sample", args, recipe, lambda **how: sample_run(recipe.require("run"), recipe.require("out"), recipe.sample, **how))


def decode(args: Args) -> Result:
    """Decode the latents `args.latents` with `args.run` into `args.out`; `label=cat` is short for `decode.label=cat`."""
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
    require_no_conflict(base, words)
    require_not_of_run(section, words)
    recipe = load_recipe(args.recipe, words, base=base)
    if recipe.cluster.kind != "local":
        raise ConfigError(
            f"cluster.kind={recipe.cluster.kind}, and `aepipe {section}` works in this process: set cluster.kind=local, or run it there"
        )
    return recipe


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
