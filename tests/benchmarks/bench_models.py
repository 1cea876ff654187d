"""One training step of a VAE 784-256-256-20, batch 128, one thread: our trainer's own step against a hand-written loop and against peers.

All have the same layers (ReLU), the same batches in memory as floats, Adam with the same learning rate, one sample of the posterior.
Ours is what `fit` does for each batch: noise of the global batch, schedules, loss, backward, fused Adam, sums for the metrics. The
hand-written loop does nothing but that step, with fused Adam. A peer is trained as its own trainer or documentation does it (torch's
default Adam, the loss read every step where it does so). torchmil's net learns the decoder's variance too: it meets our class of the same
net (`aecore.mil`, its default variances), in a loop with fused Adam. A peer that is not installed is left out (`infra/bootstrap.py peers`).
Memory is kept as the command and its workers keep it, for all sides.
"""

import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aecore.mil
from aecore._base.batch import Batch
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.write.job import shard_dataset
from aecore.nn.mlp import MLPSpec
from aecore.training.job import TrainJob, TrainSpec
from aecore.training.loop import _Training
from aecore.training.optimizer import OptimSpec, build_optimizer
from aecore.training.session import Session
from aecore.variational import VAESpec
from pipelines.cluster.memory import disable_malloc_trim
from tests import peers
from tests.benchmarks.pairs import HEADER, compare

STEPS, PAIRS, BATCH, SIZE, HIDDEN, LATENT, LR = 150, 9, 128, 784, 256, 20, 1e-3
ASKED = {"hand-written loop, fused Adam": ">= 1.0", "pyautoencoder": ">= 1.1", "pythae": ">= 1.2", "torchmil": ">= 1.8"}

Step = Callable[[Tensor], object]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(BATCH, SIZE, generator=generator) for _ in range(16)]


def encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(SIZE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())


def decoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, SIZE))


def ours(folder: Path) -> Step:
    """The step of a real run; its dataset is only there to be named."""
    np.savez(folder / "rows.npz", x=np.random.default_rng(0).random((2 * BATCH, SIZE), np.float32))
    shard_dataset(ArraysSpec(url=str(folder / "rows.npz")), str(folder / "data"))
    job = TrainJob(
        data=str(folder / "data"),
        out=str(folder / "run"),
        model=VAESpec(latent_dim=LATENT, likelihood="bernoulli"),
        backbone=MLPSpec(hidden=(HIDDEN, HIDDEN), activation="relu"),
        train=TrainSpec(global_batch=BATCH, max_steps=1_000_000, epochs=1_000_000),
    )
    session = Session(job)
    session.take()
    training = _Training(session)
    training.objective.train()
    rows = torch.arange(BATCH)

    def step(x: Tensor) -> None:
        training._train_step(Batch(x, rows, rows, BATCH))
        training.step += 1

    return step


def by_hand() -> Step:
    encode, mu_head, log_var_head, decode = encoder(), nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT), decoder()
    parameters = [parameter for module in (encode, mu_head, log_var_head, decode) for parameter in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)

    def step(x: Tensor) -> None:
        hidden = encode(x)
        mu, log_var = mu_head(hidden), log_var_head(hidden)
        z = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)
        reconstruction = F.binary_cross_entropy_with_logits(decode(z), x, reduction="sum")
        kl = -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp())
        optimizer.zero_grad(set_to_none=True)
        ((reconstruction + kl) / len(x)).backward()
        optimizer.step()

    return step


def pyautoencoder(package: types.ModuleType) -> Step:
    model = package.VAE(encoder(), decoder(), LATENT)
    model.build(torch.zeros(1, SIZE))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        result = model.compute_loss(x, model(x, S=1), beta=1.0, likelihood="bernoulli")
        optimizer.zero_grad()
        result.objective.backward()
        optimizer.step()

    return step


def pythae(package: types.ModuleType) -> Step:
    base = peers.load("pythae.models.base.base_utils")
    nets = peers.load("pythae.models.nn")

    class Encoder(nets.BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.mu, self.log_var = encoder(), nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

        def forward(self, x: Tensor) -> object:
            hidden = self.layers(x)
            return base.ModelOutput(embedding=self.mu(hidden), log_covariance=self.log_var(hidden))

    class Decoder(nets.BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(decoder(), nn.Sigmoid())  # it takes probabilities

        def forward(self, z: Tensor) -> object:
            return base.ModelOutput(reconstruction=self.layers(z))

    config = package.VAEConfig(input_dim=(SIZE,), latent_dim=LATENT, reconstruction_loss="bce")
    model = package.VAE(config, encoder=Encoder(), decoder=Decoder())
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def step(x: Tensor) -> float:
        output = model({"data": x})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        return float(output.loss.item())

    return step


def torchmil(package: types.ModuleType, *, own: bool = False) -> Step:
    """A step of torchmil's class, or of our `own`: they are called alike. Only its own trainer reads the loss every step."""
    sizes, activations = [HIDDEN, HIDDEN, LATENT], ["relu", "relu", "None"]
    model = package.VariationalAutoEncoder(input_shape=(SIZE,), layer_sizes=sizes, activations=activations, covar_mode="single")
    optimizer = build_optimizer(OptimSpec(lr=LR), model) if own else torch.optim.Adam(model.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        terms = model.compute_loss(x, reduction="mean", n_samples=1)
        loss = terms["VaeELL"] + terms["VaeKL"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not own:
            loss.item()

    return step


PEERS = {
    "pyautoencoder": ("pyautoencoder.variational", pyautoencoder),
    "pythae": ("pythae.models", pythae),
    "torchmil": ("torchmil.nn", torchmil),
}


def sides() -> dict[str, Step]:
    """Return the other sides that are here, and say which are not."""
    found: dict[str, Step] = {"hand-written loop, fused Adam": by_hand()}
    for name, (module, make) in PEERS.items():
        try:
            package = peers.load(module)
        except ImportError as error:
            print(f"({name} is left out: {error})")
        else:
            found[name] = make(package)
    return found


def main() -> None:
    disable_malloc_trim()
    torch.set_num_threads(1)
    data = batches()

    def run(step: Step) -> Callable[[], None]:
        def steps() -> None:
            for number in range(STEPS):
                step(data[number % len(data)])

        return steps

    with tempfile.TemporaryDirectory() as folder:
        our_side, others = run(ours(Path(folder))), sides()
        same_net = run(torchmil(aecore.mil, own=True))
        print(HEADER)
        for name, step in others.items():
            title = f"train VAE {SIZE}-{HIDDEN}-{HIDDEN}-{LATENT}, one thread; {name}"
            row = compare(title, same_net if name == "torchmil" else our_side, run(step), units=STEPS * BATCH, pairs=PAIRS)
            print(row.row(ASKED[name]), flush=True)
