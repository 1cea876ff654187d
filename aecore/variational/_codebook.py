"""A codebook: the nearest of K vectors replaces each vector of the encoder. Legend: B batch, E embedding, P positions, K codes, N = B P.

Statistics that move the codebook without gradients (moving averages, dead codes) are buffers, so checkpoints hold them. They are summed
over ranks in float64 before they are used, and nothing is drawn: which vector replaces a dead code is a function of the number of
updates and of the row's position in the global batch. So any number of ranks, and a resumed run, get the same codebook.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aecore._base.base import ModelOutput
from aecore._base.collective import sum_over_ranks
from aecore.loss._precision import at_least_float32, without_autocast

SMALLEST_COUNT = 1e-6  # a moving average of fewer vectors than this is not used


@dataclass(slots=True, eq=False)
class VectorQuantizerOutput(ModelOutput):
    """Quantised `z [B, E, ...]` with the gradient passed straight through, its `codes [B, ...]` int32, the `loss` to add, `perplexity`."""

    z: Tensor
    codes: Tensor
    loss: Tensor
    perplexity: Tensor


class VectorQuantizer(nn.Module):
    r"""Vector quantisation of van den Oord et al. (2017): :math:`z_q = e_k,\ k = \arg\min_j \|z - e_j\|^2`, channels first.

    The gradient of z_q is passed on to z unchanged. `commitment_cost` weighs :math:`\|z - \mathrm{sg}(e_k)\|^2`, summed over E and
    positions. The codebook follows the encoder by moving averages of the vectors assigned to each code (`codebook="ema"`: it is a
    buffer) or by the gradient of :math:`\|\mathrm{sg}(z) - e_k\|^2` (`codebook="loss"`: it is a parameter).

    A code is dead if its share of the vectors (a moving average) is below `reset_below` times the mean share 1 / K; it is replaced by a
    vector of the batch. At the first update all codes are, so the codebook begins in the data. `reset_below=0` does neither.

    `forward` changes nothing; `update` moves the codebook, once per training step, after the loss was computed:

    >>> quantizer = VectorQuantizer(num_embeddings=512, embedding_dim=64)
    >>> z = torch.randn(8, 64, 7, 7)
    >>> output = quantizer(z)
    >>> output.codes.shape
    torch.Size([8, 7, 7])
    >>> _ = quantizer.update(z, output.codes)
    """

    def __init__(
        self,
        num_embeddings: int = 512,
        embedding_dim: int = 64,
        commitment_cost: float = 0.25,
        *,
        codebook: Literal["ema", "loss"] = "ema",
        decay: float = 0.99,
        reset_below: float = 0.05,
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"num_embeddings and embedding_dim must be >= 1, got {num_embeddings} and {embedding_dim}")
        if codebook not in ("ema", "loss"):
            raise ValueError(f"codebook must be 'ema' or 'loss', got {codebook!r}")
        if not 0 <= decay < 1 or not 0 <= reset_below < 1 or commitment_cost < 0:
            got = f"decay={decay}, reset_below={reset_below}, commitment_cost={commitment_cost}"
            raise ValueError(f"expected 0 <= decay < 1, 0 <= reset_below < 1 and commitment_cost >= 0, got {got}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.commitment_cost, self.decay, self.reset_below = commitment_cost, decay, reset_below
        self.follows_gradient = codebook == "loss"
        start = torch.randn(num_embeddings, embedding_dim) / math.sqrt(embedding_dim)
        self.codebook: Tensor
        self.ema_count: Tensor
        self.ema_sum: Tensor
        self.num_updates: Tensor
        if self.follows_gradient:
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("ema_sum", start.clone())
        self.register_buffer("ema_count", torch.ones(num_embeddings))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> VectorQuantizerOutput:
        """Quantise `z [B, E, ...]`; `loss` is commitment_cost times the commitment, plus the codebook's loss if it follows a gradient."""
        codes = self.nearest(z)
        commitment, codebook = self.losses(z, codes)
        loss = self.commitment_cost * commitment + codebook
        return VectorQuantizerOutput(self.straight_through(z, codes), codes, loss, perplexity(self.count(codes)))

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the codes `[B, ...]` int32 of the codebook's vectors nearest to `z [B, E, ...]`.

        Raises
        ------
        ValueError
            The second axis of `z` is not E.
        """
        with without_autocast(z):
            vectors = self._vectors(z)
            distances = torch.addmm(self.codebook.square().sum(1), vectors, self.codebook.T, alpha=-2.0)  # without |z|^2
            return distances.argmin(1).int().reshape(z.shape[0], *z.shape[2:])

    def embed(self, codes: Tensor) -> Tensor:
        """Return the codebook's vectors `[B, E, ...]` of `codes [B, ...]`."""
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    def straight_through(self, z: Tensor, codes: Tensor) -> Tensor:
        """Return `embed(codes)` to the bit, with the gradient of `z`."""
        z = at_least_float32(z)
        return self.embed(codes).detach() + (z - z.detach())

    def losses(self, z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return commitment and codebook loss: squared distances, summed over E and positions, mean over the batch.

        The codebook loss is 0 where the codebook follows moving averages.
        """
        z, chosen = at_least_float32(z), self.embed(codes)
        with without_autocast(z):
            commitment = (z - chosen.detach()).square().flatten(1).sum(1).mean()
            if not self.follows_gradient:
                return commitment, torch.zeros_like(commitment)
            return commitment, (z.detach() - chosen).square().flatten(1).sum(1).mean()

    def count(self, codes: Tensor) -> Tensor:
        """Return how often each code was used, `[K]` float64."""
        zeros = torch.zeros(self.num_embeddings, dtype=torch.float64, device=codes.device)
        return zeros.index_add_(0, codes.flatten(), torch.ones_like(codes.flatten(), dtype=torch.float64))

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor, positions: Tensor | None = None, num_global: int | None = None) -> Tensor:
        """Move the codebook by the vectors of one training step and return the use of its codes over all ranks, `[K]` float64.

        `z [B, E, ...]` and its `codes [B, ...]` are this rank's rows, at `positions [B]` of a global batch of `num_global` (None: they are
        all of it). A rank without a sample gives empty `positions`: its row counts for nothing. A collective if torch.distributed is
        initialised.
        """
        if positions is None:
            positions = torch.arange(len(z))
        with without_autocast(z):
            vectors, flat = self._vectors(z).double(), codes.flatten()
            sums = vectors.new_zeros(self.num_embeddings, self.embedding_dim)
            counts = sums.new_zeros(self.num_embeddings)
            if len(positions):
                sums.index_add_(0, flat, vectors)
                counts = self.count(codes)
            picked = self._pick(vectors, positions.to(z.device), len(z) if num_global is None else num_global, len(vectors) // len(z))
            together = sum_over_ranks(torch.cat([counts.unsqueeze(1), sums, picked], 1))
            counts, sums, picked = together[:, 0], *torch.split(together[:, 1:], self.embedding_dim, 1)
            self.ema_count.mul_(self.decay).add_(counts.float(), alpha=1 - self.decay)
            if not self.follows_gradient:
                self.ema_sum.mul_(self.decay).add_(sums.float(), alpha=1 - self.decay)
                known = (self.ema_count > SMALLEST_COUNT).unsqueeze(1)
                mean = self.ema_sum / self.ema_count.clamp_min(SMALLEST_COUNT).unsqueeze(1)
                self.codebook.copy_(torch.where(known, mean, self.codebook))
            if self.reset_below:
                self._reset(picked.float())
            self.num_updates.add_(1)
        return counts

    def _pick(self, vectors: Tensor, positions: Tensor, num_global: int, num_places: int) -> Tensor:
        """Return one vector of the global batch per code `[K, E]`, zeros where another rank has it; all different while there are enough.

        The rows of a batch are shuffled already, so steps of a fixed size through it are as good as a draw.
        """
        total = num_global * num_places
        codes = torch.arange(self.num_embeddings, device=vectors.device)
        index = (codes * _stride(total) + self.num_updates * 7919) % total
        here = torch.full((num_global,), -1, dtype=torch.int64, device=vectors.device)
        if len(positions):
            here[positions] = torch.arange(len(positions), device=vectors.device)
        row = here[index // num_places]
        found = vectors[row.clamp_min(0) * num_places + index % num_places]
        return torch.where((row >= 0).unsqueeze(1), found, torch.zeros_like(found))

    def _reset(self, picked: Tensor) -> None:
        """Replace dead codes (all of them at the first update) by `picked [K, E]`, and give them the mean share."""
        mean = self.ema_count.mean()
        dead = (self.ema_count < self.reset_below * mean) | (self.num_updates == 0)
        self.codebook.copy_(torch.where(dead.unsqueeze(1), picked, self.codebook))
        self.ema_count.copy_(torch.where(dead, mean, self.ema_count))
        if not self.follows_gradient:
            self.ema_sum.copy_(torch.where(dead.unsqueeze(1), picked * mean, self.ema_sum))

    def _vectors(self, z: Tensor) -> Tensor:
        if z.ndim < 2 or z.shape[1] != self.embedding_dim:
            raise ValueError(
                f"z must have the shape [B, E, ...] with E = embedding_dim = {self.embedding_dim}, got {tuple(z.shape)}: "
                "end the encoder with that many channels, or with nn.Unflatten(1, (E, P)) for P codes per sample"
            )
        return at_least_float32(z).movedim(1, -1).reshape(-1, self.embedding_dim)

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, codebook={'loss' if self.follows_gradient else 'ema'}"


def perplexity(counts: Tensor) -> Tensor:
    """Return how many codes are used: exp of the entropy of their use `[K]`, between 1 and K; float32."""
    entropy: Tensor = torch.special.entr(counts / counts.sum()).sum()
    return entropy.exp().float()


def _stride(total: int) -> int:
    """Return a step that visits all of `total` places before it comes back, and spreads them: coprime, about 0.618 (golden) of it."""
    stride = max(1, int(total * 0.618))
    while math.gcd(stride, total) != 1:
        stride += 1
    return stride
