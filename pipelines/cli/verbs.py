"""The verbs of `aepipe`, in the order of its help; adding a verb is adding a function here.

A verb declares its arguments, imports what it needs when it is called, and returns a `Result` that `main.py` prints (None: nothing).
Verbs are thin: anything longer than a few lines is a function of the package that does the work.
"""

import os
from typing import Any

from aecore.errors import ConfigError, did_you_mean
from pipelines.cli import overrides, run_step
from pipelines.cli.arguments import Args, Result, Verbs, argument
from pipelines.deploy import POOL

VERBS = Verbs()
URL = argument("url", "dataset, run, table, or a root of all three")
FOLLOWS = (
    argument("--checksum", "read all samples and compare their hashes, also where files look unchanged", action="store_true"),
    argument("--accept-filter", "drop known samples that a changed filter of the source leaves out", action="store_true"),
)


@VERBS.register(
    "shard",
    "write images, arrays, tars or datasets (or generated `sprites`) as a dataset, or make one that exists follow them",
    argument(
        "src",
        "folder, .npz, .npy, idx or .tar file, one or several datasets, or a source kind; of a word that is both, ./sprites is the folder",
        nargs="+",
    ),
    argument("dataset", "dataset to create, or to bring up to date"),
    argument("--recipe", "recipe whose other sections are used"),
    *FOLLOWS,
    argument("--samples", "with --dry-run: also what so many samples of this kind would take (1e9)", metavar="N"),
    writes=True,
)
def _shard(args: Args) -> Result:
    base = {"source": _source(args), "out": args.dataset, **_follows(args)}
    if args.samples is None:
        return run_step.step("shard", args, base)
    if not args.dry_run:
        raise ConfigError(f"--samples {args.samples} estimates and writes nothing: add --dry-run, or leave it out to write the dataset")
    return run_step.step("shard", args, base, samples=_number(args.samples))


def _number(text: str) -> int:
    """Return the number of samples that a text gives; ConfigError if it is no whole number above 0."""
    try:
        number = float(text.replace("_", "").replace(",", ""))
        if 1 <= number <= 1e15 and number.is_integer():
            return int(number)
    except ValueError:
        pass
    raise ConfigError(f"--samples is {text!r}, expected a whole number of samples such as 1000000 or 1e9")


@VERBS.register(
    "adopt",
    "index external WebDataset tars in place, as a dataset; nothing is copied",
    argument("src", "folder of .tar files, one of them, or a pattern like 'shards/{00000..00009}.tar'"),
    argument("dataset", "dataset (manifest and indexes) to create, or to bring up to date"),
    argument("--recipe", "recipe whose other sections are used"),
    *FOLLOWS,
    writes=True,
)
def _adopt(args: Args) -> Result:
    base = {"source": {"kind": "webdataset", "url": args.src}, "out": args.dataset, **_follows(args)}
    return run_step.step("adopt", args, base)


def _follows(args: Args) -> dict[str, Any]:  # any: plain values
    """Return the section that the flags of FOLLOWS set, if any is given."""
    given = {name: True for name in ("checksum", "accept_filter") if getattr(args, name)}
    return {"shards": given} if given else {}


def _source(args: Args) -> dict[str, Any]:  # any: plain values
    """Return the source section for SRC: a word that is a source kind means the kind, even if a folder has that name.

    Not so for a kind that needs an address, if nothing gives one: `aepipe shard dataset OUT` reads the folder `dataset`.
    """
    from aecore.data.sources._detect import detect_source
    from aecore.registry import SOURCES, field_types
    from aecore.store import absolute_url

    word = args.src[0] if len(args.src) == 1 else "::".join(absolute_url(word, "SRC") for word in args.src)
    if word.isidentifier():
        given_url = args.recipe is not None or any(text.startswith("source.url=") for text in args.overrides)
        if word in SOURCES.kinds() and (given_url or "url" not in field_types(SOURCES.spec_type(word)) or not os.path.exists(word)):
            return {"kind": word}
        if not os.path.exists(word):
            raise ConfigError(f"there is no folder {word!r} here and no source kind of that name{did_you_mean(word, SOURCES.kinds())}")
    if any(text.startswith("source.kind=") for text in args.overrides):
        return {"url": word}
    given = {text.partition("=")[0].removeprefix("source.") for text in args.overrides if text.startswith("source.")}
    found = detect_source(word, args.dataset, given)
    return {"kind": found.kind, "url": word} | (
        {} if found.extensions is None or "extensions" in given else {"extensions": list(found.extensions)}
    )


@VERBS.register(
    "train",
    "train the model of a recipe: data=... out=...",
    argument("recipe", "recipe file or shipped recipe", nargs="?"),
    writes=True,
)
def _train(args: Args) -> Result:
    return run_step.step("train", args, {})


@VERBS.register(
    "encode",
    "encode a dataset with a trained run into a latent table",
    argument("run", "trained run"),
    argument("dataset", "dataset"),
    argument("table", "table to create, or to bring up to the newest generation of the dataset"),
    argument("--add-columns", "columns of the dataset's index to add to a table that exists, such as source,width", metavar="NAMES"),
    argument("--recipe", "recipe whose encode and cluster sections are used"),
    writes=True,
)
def _encode(args: Args) -> Result:
    base: dict[str, Any] = {"run": args.run, "data": args.dataset, "out": args.table}  # any: plain values
    if args.add_columns is not None:
        base["encode"] = {"add_columns": [name.strip() for name in args.add_columns.split(",") if name.strip()]}
    return run_step.step("encode", args, base)


@VERBS.register(
    "evaluate",
    "score a trained run on a split (evaluate.split=test, .iwae=100, .probe=true, .factors=true)",
    argument("run", "trained run"),
    argument("dataset", "dataset"),
    argument("--figures", "write figures of the model to this folder or s3://bucket/prefix", metavar="OUT"),
    argument("--recipe", "recipe whose evaluate section is used"),
    writes=True,
)
def _evaluate(args: Args) -> Result:
    base = {"run": args.run, "data": args.dataset} | ({"evaluate": {"figures": args.figures}} if args.figures else {})
    result = run_step.step("evaluate", args, base)
    if args.dry_run:
        return result
    from pipelines.cli import scores

    return result._replace(as_text=scores.of_evaluation)


@VERBS.register(
    "sample",
    "draw samples from the prior of a trained run (num=64 seed=0; label=cat for a conditional model)",
    argument("run", "trained run"),
    argument("out", "folder or s3://bucket/prefix for the samples"),
    argument("--recipe", "recipe whose sample section is used"),
    writes=True,
)
def _sample(args: Args) -> Result:
    from pipelines.cli import generate

    return generate.sample(args)


@VERBS.register(
    "decode",
    "turn latents back into data with a trained run",
    argument("run", "trained run"),
    argument("latents", "latent table of this run, or a .npy or .npz file of latents [n, D]"),
    argument("out", "folder or s3://bucket/prefix for the decoded samples"),
    argument("--recipe", "recipe whose decode section is used"),
    writes=True,
)
def _decode(args: Args) -> Result:
    from pipelines.cli import generate

    return generate.decode(args)


@VERBS.register(
    "run",
    "shard, train, encode and evaluate a recipe as one flow: out=...",
    argument("recipe", "recipe file or shipped recipe"),
    writes=True,
)
def _run(args: Args) -> Result:
    return run_step.pipeline(args)


@VERBS.register(
    "submit",
    "run a recipe as a job on a Ray cluster: out=... cluster.address=http://host:8265",
    argument("recipe", "recipe file or shipped recipe"),
    argument("--no-wait", "print the job's id and return; the same command without this option follows the job", action="store_true"),
    argument("--detach", "the same as --no-wait", action="store_true", dest="no_wait"),
    argument("--stop", "stop the job of this recipe", action="store_true"),
    writes=True,
)
def _submit(args: Args) -> Result:
    return run_step.submit(args)


@VERBS.register(
    "show",
    "show what is at a URL",
    URL,
    argument(
        "--files",
        "of a table, or the newest one of a root: the paths of the Parquet files of its newest generation, one a line",
        action="store_true",
    ),
    argument("--sql", "of a table: SQL for DuckDB that makes a view `latents` of these files", action="store_true"),
    recipe=False,
)
def _show(args: Args) -> Result:
    from pipelines.cli import text
    from pipelines.steps import show

    if args.files or args.sql:
        return Result(show.table_files(args.url, sql=args.sql), text.of_files)
    return Result(show.show(args.url), text.of_show)


@VERBS.register(
    "status",
    "show which generation of the dataset the runs and tables of a pipeline belong to, and whether the newest is up to date",
    argument("url", "root of a pipeline"),
    recipe=False,
)
def _status(args: Args) -> Result:
    from pipelines.cli import text
    from pipelines.steps import status

    return Result(status.status(args.url), text.of_tree)


@VERBS.register(
    "verify",
    "check that what is at a URL is complete and undamaged; in a root also that its parts belong together",
    URL,
    argument("--read-data", "read every byte and compare the hashes", action="store_true"),
    argument(
        "--read-data-subset",
        "read the k-th of n slices of the shards and parts: n nightly checks read all (which one a part is in follows from the hash of its "
        "name, so slices of few parts differ in size, and some are empty)",
        metavar="K/N",
    ),
    argument("--dataset", "where the dataset of a table is now (default: where it was encoded from; in a root: its dataset/)"),
    recipe=False,
)
def _verify(args: Args) -> Result:
    from pipelines.cli import text
    from pipelines.steps import show

    report = show.verify(args.url, read_data=args.read_data, dataset=args.dataset, subset=args.read_data_subset)
    return Result(report, lambda found: f"ok\n{text.of_tree(found)}")


@VERBS.register(
    "compare",
    "show how two runs, tables, datasets or roots differ",
    argument("a", "run, table, dataset, or a root of all three"),
    argument("b", "another one of the same kind"),
    argument("--values", "of datasets: decode all samples, and compare them whatever files and keys they have", action="store_true"),
    recipe=False,
)
def _compare(args: Args) -> Result:
    from aecore.maintenance.compare import compare
    from pipelines.cli import text

    return Result(compare(args.a, args.b, values=args.values), text.of_compare)


@VERBS.register(
    "gc",
    "remove what killed or superseded attempts left (never what a manifest names)",
    URL,
    argument("--older-than", "keep anything newer than this, which may still be in use, for example 7d", default="1d"),
    argument(
        "--keep-generations",
        "of a table or dataset: keep the parts that these last generations name; of a root: so many last runs",
        type=int,
        default=2,
        metavar="N",
    ),
    argument("--retention", "keep parts, or runs of a root, that were replaced or retired less than this ago, as 30d", default="7d"),
    argument(
        "--compact",
        "first write shards of a dataset again of which more than this share was removed, for example 0.5 (0: all that lost samples)",
        type=float,
        metavar="SHARE",
    ),
    argument("--copy", "with --compact: also copy what is left of adopted tars into tars of the dataset", action="store_true"),
    argument("--unfinished", "also remove what the same command would continue from", action="store_true"),
    writes=True,
    recipe=False,
)
def _gc(args: Args) -> Result:
    from pipelines.cli import text
    from pipelines.steps import gc

    limits = {"older_than": args.older_than, "keep_generations": args.keep_generations, "retention": args.retention}
    limits |= {"compact": args.compact, "copy": args.copy}
    return Result(gc.gc(args.url, **limits, unfinished=args.unfinished, dry_run=args.dry_run), text.of_gc)


@VERBS.register(
    "doctor",
    "check this machine, the store at URL, the Ray cluster and the Prefect server",
    argument("url", "URL at which artefacts will be written", nargs="?"),
    argument("--recipe", "recipe whose cluster section the machine or cluster has to fit"),
)
def _doctor(args: Args) -> Result:
    from pipelines import doctor
    from pipelines.cli import text

    found = doctor.doctor(args.url, args.recipe, tuple(args.overrides))
    return Result(found, text.of_doctor, found["exit_code"])


@VERBS.register(
    "list",
    "list models, backbones, sources, recipes, or the sections of a recipe with every key",
    argument("what", choices=("models", "backbones", "sources", "recipes", "sections")),
    recipe=False,
)
def _list(args: Args) -> Result:
    from pipelines.cli import text
    from pipelines.steps import catalog

    return Result(catalog.parts(args.what), text.of_parts)


@VERBS.register(
    "serve",
    "serve the flows of recipes: wait for scheduled and manual runs (Prefect)",
    argument("recipes", "recipe files or shipped recipes", nargs="*", metavar="RECIPE"),
    argument("--cron", "cron expression for the pipelines of the recipes, for example '0 3 * * *'"),
)
def _serve(args: Args) -> None:
    from pipelines.deploy.serve import serve

    serve(_recipes("serve", args), cron=args.cron)


@VERBS.register(
    "deploy",
    "deploy the flows of recipes to the Prefect server of PREFECT_API_URL, for workers of a process work pool",
    argument("recipes", "recipe files or shipped recipes (without: flows that take a recipe as parameter)", nargs="*", metavar="RECIPE"),
    argument("--cron", "cron expression for the pipelines of the recipes, for example '0 3 * * *'"),
    argument("--pool", f"work pool, created if it does not exist (default: {POOL})", default=POOL, metavar="NAME"),
    writes=True,
)
def _deploy(args: Args) -> Result:
    from pipelines.cli import text
    from pipelines.deploy.pool import deploy

    return Result(deploy(_recipes("deploy", args), args.cron, args.pool, dry_run=args.dry_run), text.of_deployments)


def _recipes(verb: str, args: Args) -> list[Any]:
    """Return the named recipes, each with the overrides; ConfigError for overrides without a recipe."""
    from pipelines.recipe.recipe import load_recipe

    if not args.recipes:
        overrides.refuse(verb, args.overrides, "has no recipe to change")
    return [load_recipe(name, args.overrides) for name in args.recipes]


@VERBS.register("demo", "make a small table of latents from generated sprites, in ./demo or out=...", writes=True)
def _demo(args: Args) -> Result:
    from pipelines.cli.demo import demo

    return demo(args)
