"""Random numbers that do not depend on the number of ranks: drawn for the whole global batch, then sliced by position."""

import hashlib

import torch
from torch import Tensor


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed, a pure function of the parts' text: seed_of("noise", 0, 17)."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise `[num_global, ...]` (float32, CPU) for one step or one evaluation batch.

    Always drawn on the CPU: the bits then are the same for a CPU and a GPU run. Slice it by `Batch.positions`.
    """
    generator = torch.Generator().manual_seed(seed_of("noise", seed, index))
    return torch.randn(shape, generator=generator)


def seed_generators(seed: int, device: torch.device | str) -> None:
    """Seed torch's global generators, the CPU's and that of `device`, as `torch.manual_seed` does.

    That function also formats a stack trace for each of three kinds of devices, for the case that one appears later: 0.4 ms, a tenth of
    the step of a small model.
    """
    torch.default_generator.manual_seed(seed)
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed_all(seed)
