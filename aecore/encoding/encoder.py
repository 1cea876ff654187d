"""A loaded model as a function: a stored batch in, columns of the latent table out.

It uses only `latents`, `reconstruct` and `noise_shape`, so it works for every model.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from aecore._base.batch import Batch
from aecore._base.noise import seed_of, step_noise
from aecore._base.trainable import ModelSpec, has_posterior
from aecore.checkpoint.weights import LoadedModel
from aecore.data.format.transform import Transform
from aecore.errors import ConfigError
from aecore.loss import kl_divergence_diag_gaussian
from aecore.registry import knob, spec
from aecore.table.manifest import ALL, METADATA

OPTIONAL_COLUMNS = {"reconstruction": "recon_error", "kl": "kl", "sample": "z"}  # option -> the column that it adds
CACHED_BYTES = 3 << 20  # of float32 inputs: of 256x256 RGB images four rows take 1.0 ms each, 64 rows 1.4
SEQUENCES = 64  # in a piece on a CPU: one of few sequences of about one length is filled up to it


@spec
class EncodeSpec:
    """What the latent table holds and how it is computed."""

    batch: int = knob(512, "rows that are read, decoded and given noise together, cut inside a shard; on a GPU one forward pass", ge=1)
    dtype: Literal["float32", "float16"] = knob("float32", "type of the latent columns")
    reconstruction: bool = knob(False, "add recon_error: mean squared error of the reconstruction, per row")
    kl: bool = knob(False, "add kl: KL divergence of the posterior from the prior, in nats per row")
    sample: bool = knob(False, "add z: one sample of the posterior")
    seed: int = knob(0, "seed of the sampled column", ge=0)
    rows_per_part: int = knob(
        0, "rows per part, rounded up to a multiple of encode.batch; fewer where samples were removed since; 0: one part per shard", ge=0
    )
    columns: tuple[str, ...] = knob(
        (ALL,),
        "columns of the dataset's index that rows keep beside key, label and group: names (sample_sha256 is the index's sha256), `all`, or "
        "`metadata`: those that do not describe the file. A table that exists keeps its columns",
        since=2,
        absent=(METADATA,),
    )
    split: str = knob("", "encode only this split; empty: all", since=2)
    where: str = knob(
        "", "encode only the samples of this predicate over index columns, such as 'width >= 64 and label_name = \"cat\"'", since=2
    )
    bits: Literal[1, 2] = knob(
        2,
        "2: rows pass through the model in pieces of one size, each with noise of its own, so its bits do not depend on the other rows; "
        "1: as tables of before, which keep that",
        since=2,
        absent=1,
    )
    add_columns: tuple[str, ...] = knob(
        (), "columns to add to a table that exists: its parts are written again with them, without the model", identity=False
    )
    compression: Literal["zstd", "none"] = knob("zstd", "compression of the parts", identity=False)


def require_posterior(model: ModelSpec, spec: EncodeSpec) -> None:
    """Raise ConfigError if columns are requested that only a model with a posterior has."""
    if (spec.kl or spec.sample) and not has_posterior(model.columns):
        raise ConfigError(
            f"model.kind={model.kind} has no posterior (its latents are {', '.join(model.columns)}): encode.kl and encode.sample need a "
            "model of the VAE family; set both to false"
        )


class Encoder:
    """A loaded model as a function: transformed batch in, columns of the table out."""

    def __init__(self, loaded: LoadedModel, spec: EncodeSpec, device: str) -> None:
        self.model = loaded.model
        self.likelihood: str = loaded.config.model.likelihood
        self.transform = Transform(loaded.config.transform)
        self.input_shape = loaded.config.input_shape
        self.channels = loaded.config.channels
        self.spec = spec
        self.device = device
        require_posterior(loaded.config.model, spec)

    def pieces(self, batch: Batch, eps: Tensor | None) -> Iterator[tuple[Tensor, Batch, Tensor | None]]:
        """Yield (rows, their part of a stored batch, its noise) that go through the model together.

        On a CPU a piece is as large as fits its activations into the cache, by the shape of a row alone. With `encode.bits=2` all pieces
        have the same number of rows, whatever the batch has: the last row of a shorter one is repeated. Matrix products choose their
        order of sums by the number of rows (10 of 90 rows differed in bits between a short piece and a full one), of which a sequence has
        one for each step: so a piece has sequences of about one length, padded to a number of steps that each of them would have alone.
        """
        bits, most = self.spec.bits, self.spec.batch if self.spec.bits > 1 else len(batch)
        for number, group in self._of_one_shape(batch) if bits > 1 else [(torch.arange(len(batch)), batch)]:
            rows, row_bytes = most, group.x[0].numel() * torch.finfo(torch.float32).bits // 8
            if self.device == "cpu":
                rows = max(1, CACHED_BYTES // row_bytes)
                rows = min(rows, SEQUENCES) if bits > 1 and group.lengths is not None else rows
            if bits > 1:
                rows = -(-most // -(-most // rows))  # equal pieces: little is repeated
            for taken, piece in zip(torch.split(number, rows), group.split(rows), strict=True):
                noise = None if eps is None else eps[taken]
                if bits > 1 and len(piece) < rows:
                    piece = piece.padded(rows)
                    noise = None if noise is None else torch.cat([noise, noise[-1:].expand(rows - len(noise), *noise.shape[1:])])
                yield taken, piece, noise

    def _of_one_shape(self, batch: Batch) -> Iterator[tuple[Tensor, Batch]]:
        """Yield (rows, themselves): all, or of a model of sequences of any length those of up to 1, 2, 4, 8, ... steps."""
        if 0 not in self.input_shape:
            yield torch.arange(len(batch)), batch
            return
        lengths = torch.full((len(batch),), batch.x.shape[1]) if batch.lengths is None else batch.lengths
        exponents = [(length - 1).bit_length() for length in lengths.tolist()]
        for exponent in sorted({*exponents}):
            rows = torch.tensor([row for row, own in enumerate(exponents) if own == exponent])
            yield rows, dataclasses.replace(batch, lengths=lengths).take(rows).with_steps(1 << exponent)

    @torch.inference_mode()
    def columns(self, batch: Batch, eps: Tensor | None) -> dict[str, Tensor]:
        """Return name -> `[n, D]` or `[n]` of a piece of a stored batch; `eps` is the noise of its rows where a sample is asked for."""
        self.model.require_samples(batch)
        return self._columns(self.transform(batch.to(self.device)), eps)

    def _columns(self, ready: Batch, eps: Tensor | None) -> dict[str, Tensor]:
        columns: dict[str, Tensor] = dict(self.model.latents(ready))
        if eps is not None:
            scale: Tensor = torch.exp(0.5 * columns["log_var"])
            columns["z"] = columns["mu"] + scale * eps.to(self.device).flatten(1)
        if self.spec.reconstruction:
            error = self.model.reconstruct(ready, likelihood=self.likelihood) - ready.x
            columns["recon_error"] = ready.mean_per_row(error.float().square())
        if self.spec.kl:
            columns["kl"] = kl_divergence_diag_gaussian(columns["mu"], columns["log_var"])
        return columns

    @torch.inference_mode()
    def describe(self) -> dict[str, Any]:
        """Return name -> {dtype, dim} of the columns (dim None: one number per row), found by encoding one row of zeros."""
        ready = Batch.blank(self.input_shape, self.device)
        columns = self._columns(ready, self.noise(ready, 0, "", [("", "")]))
        return {
            name: {"dtype": self._dtype(column), "dim": column.shape[1] if column.ndim == 2 else None} for name, column in columns.items()
        }

    def _dtype(self, column: Tensor) -> str:
        if not column.is_floating_point():
            return "int32"
        return self.spec.dtype if column.ndim == 2 else "float32"

    def noise(self, batch: Batch, index: int, shard_sha256: str, samples: Sequence[tuple[str, str]] = ()) -> Tensor | None:
        """Return the noise of a batch's rows; None if no sample is asked for.

        It is drawn from the seed and each row's (key, sha256), which `samples` has; with `encode.bits=1` from (seed, shard, batch) for the
        whole cut.
        """
        shape = self.model.noise_shape()
        if not self.spec.sample or shape is None:
            return None
        if self.spec.bits > 1:
            return torch.cat([step_noise(seed_of("encode", self.spec.seed, key, sha256), 0, (1, *shape)) for key, sha256 in samples])
        return step_noise(seed_of("encode", self.spec.seed, shard_sha256), index, (batch.num_global, *shape))[batch.positions]
