"""`aepipe demo`: from generated images to a table of latents in one command, with suggestions what to look at afterwards.

It runs the shipped recipe `demo` as the pipeline flow and adds only the texts and the default `out`.
"""

import sys

from aecore.errors import printable
from pipelines.cli import run_step, text
from pipelines.cli.arguments import Args, Result
from pipelines.recipe.recipe import load_recipe

BEFORE = """A pile of images becomes a table of latents: 3,072 sprites are drawn and sharded, a small VAE is trained on two Ray workers,
every image is encoded, the test split is scored; as one Prefect flow, under {out}
"""
AFTER = """
Where things are:
  {out}/dataset   WebDataset shards with a Parquet index      aepipe show {out}/dataset
  {out}/run       checkpoints, metrics, the model             aepipe show {out}/run
  {out}/table     one row of latents per image                aepipe verify {out}/table --read-data
A query to try in DuckDB, after the line that `aepipe show {out}/table --sql` prints:
  SELECT label, count(*) AS images, avg(kl) AS kl, avg(mu[1]) AS mu_1 FROM latents GROUP BY label ORDER BY label"""


def demo(args: Args) -> Result:
    """Run the recipe under `./demo`, or under `out=` if the overrides set it; a dry run equals that of `aepipe run demo`."""
    place = [] if any(word.startswith("out=") for word in args.overrides) else ["out=./demo"]
    args.recipe, args.overrides = "demo", [*place, *args.overrides]
    if args.dry_run:
        return run_step.pipeline(args)
    out = printable(load_recipe(args.recipe, args.overrides).require("out"), one_line=True)
    from pipelines.steps.progress import write_text

    write_text(sys.stderr, BEFORE.format(out=out))
    made = run_step.pipeline(args)
    return made._replace(as_text=lambda found: f"{text.of_pipeline(found)}\n{AFTER.format(out=out)}")
