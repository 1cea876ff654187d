"""`aepipe`: the only place that prints and that turns errors into exit codes.

    aepipe VERB ARGUMENTS [key.path=value ...] [--json] [--dry-run]

Words of the form `key.path=value` are overrides of the recipe and may stand anywhere. Results go to standard output, progress
and errors to standard error; what `--json` prints is always valid JSON. Heavy imports happen inside the verb that needs them.
Exit codes: 0 ok, 1 the run failed, 2 usage or config, 3 input data, 4 storage, 5 cluster or resources, 130 interrupted.
"""

import argparse
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from aecore.errors import AecoreError, ConfigError, DataError, did_you_mean

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
Args = argparse.Namespace
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args([word for word in words if not OVERRIDE.match(word)])
    args.overrides = [word for word in words if OVERRIDE.match(word)]
    _log(args.debug)
    if threading.current_thread() is threading.main_thread():  # `docker stop` and cluster schedulers end like Ctrl-C: workers too
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _require_used(args)
        args.verb(args)
    except KeyboardInterrupt:
        print("aepipe: interrupted; what is finished is kept, the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except AecoreError as error:
        if args.debug:
            traceback.print_exc()
        print(f"aepipe: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as in `aepipe show x | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  so that the interpreter's own flush at exit does not fail
        return 0
    return 0


def _require_used(args: Args) -> None:
    """ConfigError for overrides that the verb would not read."""
    name = args.verb.__name__.strip("_")
    if args.overrides and (not args.reads_recipe or (name == "serve" and not args.recipes)):
        here = "has no recipe to change" if args.reads_recipe else "reads no recipe"
        raise ConfigError(
            f"`aepipe {name}` {here}, so {' '.join(map(repr, args.overrides))} would change nothing: leave it out "
            f"(options: aepipe {name} --help; a path with '=' in it is written with ./ in front)"
        )


def _shard(args: Args) -> None:
    base = {"source": _source(args.src), "out": args.dataset}
    _step("shard", args, base, ("source", "splits", "shards", "cluster"))


def _source(word: str) -> dict[str, str]:
    """Return the section of SRC: a bare word that is a source kind means the kind, also where a folder has its name."""
    from aecore.registry import SOURCES

    if word.isidentifier():
        if word in SOURCES.kinds():
            return {"kind": word}
        if not os.path.exists(word):
            raise ConfigError(f"there is no folder {word!r} here and no source kind of that name{did_you_mean(word, SOURCES.kinds())}")
    return {"kind": "folder", "url": word}


def _train(args: Args) -> None:
    sections = ("model", "backbone", "transform", "optim", "train", "checkpoint", "input", "cluster")
    _step("train", args, {}, sections)


def _encode(args: Args) -> None:
    _step("encode", args, {"run": args.run, "data": args.dataset, "out": args.table}, ("encode", "cluster"))


def _evaluate(args: Args) -> None:
    _step("evaluate", args, {"run": args.run, "data": args.dataset}, ("evaluate", "cluster"))


def _step(name: str, args: Args, base: Mapping[str, Any], sections: Sequence[str]) -> None:
    """Run one step: directly, or as its flow where a Prefect server is configured."""
    from pipelines import steps, text
    from pipelines.config import load_recipe
    from pipelines.progress import both, terminal

    _require_no_conflict(base, args.overrides)
    recipe = load_recipe(args.recipe, args.overrides, base=base)
    dry_run = getattr(args, "dry_run", False)
    if os.environ.get("PREFECT_API_URL") and not dry_run:
        summary = _flow(name, args.debug)(recipe.travelling())
    else:
        summary = steps.STEPS[name](recipe, both(terminal(), _milestones()), dry_run=dry_run)
    if dry_run:
        summary = {**summary, "recipe": recipe.resolved(sections)}
    _print(args, summary, text.of_step)


def _require_no_conflict(base: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """ConfigError if an override gives another value than the argument that stands for the same key."""
    from aecore.store import absolute_url
    from pipelines.tree import apply_overrides

    for path, said in _leaves(base):
        value: Any = apply_overrides(base, overrides)
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        same = value == said or (path[-1] != "kind" and bool(value) and absolute_url(str(value)) == absolute_url(said))
        if not same:
            key = ".".join(path)
            raise ConfigError(
                f"{key} is given twice: {said!r} as an argument and {value!r} as an override ({key}=...): leave out one of them"
            )


def _leaves(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _run(args: Args) -> None:
    from pipelines import steps, text
    from pipelines.config import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    steps.check_pipeline(recipe)
    if args.dry_run:
        names = steps.stages(recipe)
        plan = {"stages": {name: steps.stage(recipe, name).tree["out"] for name in names}, "recipe": recipe.resolved()}
        if names[0] == "shard":
            plan["shard"] = steps.shard(steps.stage(recipe, "shard"), dry_run=True)
        return _print(args, plan, text.of_tree)
    return _print(args, _flow("pipeline", args.debug)(recipe.travelling()), text.of_pipeline)


DEMO = """A pile of images becomes a table of latents: 3,072 sprites are drawn and sharded, a small VAE is trained on two Ray workers,
every image is encoded, the test split is scored; as one Prefect flow, under {out}
"""
DEMO_END = """
Where things are:
  {out}/dataset   WebDataset shards with a Parquet index      aepipe show {out}/dataset
  {out}/run       checkpoints, metrics, the model             aepipe show {out}/run
  {out}/table     one row of latents per image                aepipe verify {out}/table --read-data
A query to try (DuckDB; python -c "import duckdb; duckdb.sql('...').show()"):
  SELECT label, count(*) AS images, avg(kl) AS kl, avg(mu[1]) AS mu_1 FROM '{out}/table/data/**/*.parquet' GROUP BY label ORDER BY label"""


def _demo(args: Args) -> None:
    from pipelines import text
    from pipelines.config import load_recipe

    args.overrides = args.overrides if any(word.startswith("out=") for word in args.overrides) else ["out=./demo", *args.overrides]
    recipe = load_recipe("demo", args.overrides)
    out = recipe.require("out")
    print(DEMO.format(out=out), file=sys.stderr)
    summaries = _flow("pipeline", args.debug)(recipe.travelling())
    _print(args, summaries, lambda found: f"{text.of_pipeline(found)}\n{DEMO_END.format(out=out)}")


def _show(args: Args) -> None:
    from pipelines import show, text

    _print(args, show.show(args.url), text.of_tree)


def _verify(args: Args) -> None:
    from pipelines import show, text

    report = show.verify(args.url, read_data=args.read_data, dataset=args.dataset)
    _print(args, report, lambda found: f"ok\n{text.of_tree(found)}")


def _list(args: Args) -> None:
    from pipelines import catalog, text

    _print(args, catalog.parts(args.what), text.of_parts)


def _serve(args: Args) -> None:
    from pipelines import deploy
    from pipelines.config import load_recipe

    recipes = [load_recipe(name, args.overrides) for name in args.recipes]
    deploy.serve(recipes, cron=args.cron)


def _flow(name: str, debug: bool) -> Callable[..., Any]:
    """Return a Prefect flow; its console keeps tracebacks for `--debug` (Prefect's own record has them always)."""
    from importlib import import_module

    flows: Any = import_module("pipelines.flows")
    flows.require_server()
    module = import_module(f"pipelines.flows.{name}")
    for logger in ("aecore", "pipelines"):  # Prefect's own handlers take them from here on
        logging.getLogger(logger).handlers = []
    if not debug:
        import_module("pipelines.flows.console").hide_tracebacks()
    flow: Callable[..., Any] = getattr(module, f"{name}_flow")
    return flow


def _milestones() -> Any:
    from pipelines.progress import log_to

    return log_to(logging.getLogger("pipelines"))


def _print(args: Args, data: Any, as_text: Callable[[Any], str]) -> None:
    print(_json(data) if args.json else as_text(data))


def _json(data: Any) -> str:
    """Return the result as JSON, which has no NaN and no infinity: DataError that names where they are."""
    try:
        return json.dumps(data, indent=2, default=str, allow_nan=False)
    except ValueError:
        found = "; ".join(f"{path} is {value}" for path, value in _not_finite(data, ""))
        raise DataError(f"the result holds numbers that JSON cannot say: {found}; look at it without --json, and check the data") from None


def _not_finite(data: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(data, float) and not math.isfinite(data):
        yield path, data
    elif isinstance(data, Mapping | list | tuple):
        for key, value in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from _not_finite(value, f"{path}.{key}" if path else str(key))


def _log(debug: bool) -> None:
    """Log to standard error: lines of progress where there is no terminal to draw on, warnings where there is one."""
    level = logging.DEBUG if debug else logging.WARNING if sys.stderr.isatty() else logging.INFO
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if debug else "%(message)s"))
    for name in ("aecore", "pipelines"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aepipe", description="Raw data to a table of latents.", epilog="key.path=value sets any key of a recipe"
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(function: Callable[[Args], Any], about: str, *, writes: bool = False, recipe: bool = True) -> argparse.ArgumentParser:
        epilog = parser.epilog if recipe else None
        sub = verbs.add_parser(function.__name__.strip("_"), help=about, description=about, epilog=epilog)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--debug", action="store_true", help="log everything, show tracebacks")
        if writes:
            sub.add_argument("--dry-run", action="store_true", help="check and say what would be done; write nothing")
        sub.set_defaults(verb=function, reads_recipe=recipe)
        return sub

    sub = verb(_shard, "write a folder of images (or the source kind `sprites`) as a dataset, or append what is new", writes=True)
    _positional(
        sub,
        src="folder, or a source kind (a bare word that is both means the kind: write ./sprites for the folder)",
        dataset="where the dataset is or goes",
    )
    sub.add_argument("--recipe", help="recipe whose other sections are used")
    sub = verb(_train, "train a recipe: data=... out=...", writes=True)
    sub.add_argument("recipe", nargs="?", metavar="RECIPE", help="recipe file or shipped recipe")
    sub = verb(_encode, "encode a dataset with a trained run into a latent table", writes=True)
    _positional(sub, run="trained run", dataset="dataset", table="where the table is or goes")
    sub.add_argument("--recipe", help="recipe whose encode and cluster sections are used")
    sub = verb(_evaluate, "score a trained run on a split (evaluate.split=test)")
    _positional(sub, run="trained run", dataset="dataset")
    sub.add_argument("--recipe", help="recipe whose evaluate section is used")
    sub = verb(_run, "shard, train, encode and evaluate a recipe as one flow: out=...", writes=True)
    _positional(sub, recipe="recipe file or shipped recipe")
    sub = verb(_show, "say what lies at a URL", recipe=False)
    _positional(sub, url="dataset, run, table, or a root of all three")
    sub = verb(_verify, "check what lies at a URL", recipe=False)
    _positional(sub, url="dataset, run, table, or a root of all three")
    sub.add_argument("--read-data", action="store_true", help="read every byte and compare the hashes")
    sub.add_argument("--dataset", help="where the dataset of a table lies now (else: where it was encoded from; in a root: its dataset/)")
    sub = verb(_list, "list models, backbones, sources or recipes", recipe=False)
    sub.add_argument("what", choices=("models", "backbones", "sources", "recipes"))
    sub = verb(_serve, "wait for scheduled and manual runs of the flows (Prefect)")
    sub.add_argument("recipes", nargs="*", metavar="RECIPE", help="recipe files or shipped recipes")
    sub.add_argument("--cron", help="cron expression for the pipelines of the recipes, for example '0 3 * * *'")
    verb(_demo, "make a small table of latents from generated sprites, under ./demo or out=...")
    return parser


def _positional(parser: argparse.ArgumentParser, **arguments: str) -> None:
    for name, about in arguments.items():
        parser.add_argument(name, metavar=name.upper(), help=about)


if __name__ == "__main__":
    sys.exit(main())
