"""Disentanglement on the sprites: AdaGVAE, trained on pairs, against VAEs of beta 1, 4 and 8 without them.

3,072 sprites (3 shapes x 4 scales x 16 x 16 positions, 32x32), 1024-400-400-10, 2,500 steps of Adam 1e-3 on 64 pairs or 128 images, so
all see as many images. DCI disentanglement and MIG of all images, with the settings of disentanglement_lib. The seeds are fresh: none of
them was looked at when the recipes' settings were chosen. A seed's ratio is to the best beta of that seed; what counts is their median.
The ELBO and the active units stand beside the scores, since a collapsed posterior can look disentangled.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from aecore.data.read.pairs import PairSpec
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.evaluate import EvaluateSpec, evaluate
from aecore.native import processor
from aecore.nn.mlp import MLPSpec
from aecore.training.job import TrainJob, TrainSpec
from aecore.training.loop import fit
from aecore.training.optimizer import OptimSpec
from aecore.variational import AdaGVAESpec, VAESpec
from pipelines.cluster.memory import disable_malloc_trim

SEEDS, STEPS, PAIRS, LATENTS = (101, 102, 103), 2500, 64, 10
BETAS = (1.0, 4.0, 8.0)
ASKED = {"dci": 2.0, "mig": 1.4}
HEADER = "| model | seed | DCI | MIG | FactorVAE | -ELBO | KL | active units | processor |\n|---|--:|--:|--:|--:|--:|--:|--:|---|"


@dataclass(frozen=True)
class Run:
    """Scores of one trained model."""

    model: str
    seed: int
    dci: float
    mig: float
    factor_vae: float
    elbo: float
    kl: float
    active: int

    def row(self) -> str:
        """Return a row of the table."""
        scores = " | ".join(f"{value:.3f}" for value in (self.dci, self.mig, self.factor_vae))
        active = f"{self.active} of {LATENTS} | {processor().name}"
        return f"| {self.model} | {self.seed} | {scores} | {-self.elbo:.1f} | {self.kl:.1f} | {active} |"


def jobs(data: str, root: Path, seed: int, steps: int = STEPS) -> Iterator[tuple[str, TrainJob]]:
    """Yield every model with the job that trains it from one seed."""
    models = [(f"beta {beta:g}", VAESpec(latent_dim=LATENTS, likelihood="bernoulli", beta=beta), PairSpec()) for beta in BETAS]
    models.append(("AdaGVAE", AdaGVAESpec(latent_dim=LATENTS, likelihood="bernoulli"), PairSpec(by="factors", k=1)))
    for name, model, pairs in models:
        rows = PAIRS if name == "AdaGVAE" else 2 * PAIRS
        train = TrainSpec(epochs=steps, max_steps=steps, global_batch=rows, seed=seed)
        out = str(root / f"{name.replace(' ', '-')}-{seed}")
        backbone, optim = MLPSpec(hidden=(400, 400)), OptimSpec(lr=1e-3)
        yield name, TrainJob(data=data, out=out, model=model, backbone=backbone, optim=optim, train=train, pairs=pairs)


def scored(name: str, job: TrainJob) -> Run:
    """Train and score one model on all images."""
    fit(job)
    found = evaluate(job.out, job.data, EvaluateSpec(split="train", factors=True, seed=job.train.seed))
    scores = found.disentanglement
    assert scores is not None and found.elbo is not None and found.kl is not None and found.active_units is not None
    terms = (scores["dci"]["disentanglement"], scores["mig"], scores["factor_vae"])
    return Run(name, job.train.seed, *terms, found.elbo, found.kl, found.active_units)


def ratios(runs: Sequence[Run], score: str) -> list[float]:
    """Return, seed by seed, the score of AdaGVAE over that of the best beta."""
    found = []
    for seed in dict.fromkeys(run.seed for run in runs):
        own = {run.model: float(getattr(run, score)) for run in runs if run.seed == seed}
        found.append(own.pop("AdaGVAE") / max(own.values()))
    return found


def main(seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> None:
    torch.set_num_threads(1)
    disable_malloc_trim()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        shard_dataset(SpritesSpec(), f"{folder}/data")
        print(HEADER)
        for seed in seeds:
            for name, job in jobs(f"{folder}/data", Path(folder), seed, steps):
                runs.append(scored(name, job))
                print(runs[-1].row(), flush=True)
    for score, asked in ASKED.items():
        found = ratios(runs, score)
        median = statistics.median(getattr(run, score) for run in runs if run.model == "AdaGVAE")
        shown = ", ".join(f"{ratio:.2f}" for ratio in found)
        print(f"{score}: median {median:.3f}; {statistics.median(found):.2f} times the best beta ({shown}); asked >= {asked}")


if __name__ == "__main__":
    main()
