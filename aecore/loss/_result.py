"""What a loss returns: the scalar to minimise and named diagnostics that cost no device sync until they are read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class Diagnostics(Mapping[str, float]):
    """A read-only mapping of floats over detached tensors; each value is converted (`.item()`) when it is read."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> float:
        return float(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass(slots=True, init=False, eq=False, repr=False)
class LossResult:
    """Objective and diagnostics of one batch.

    Attributes
    ----------
    objective
        Scalar to minimise, attached to the graph.
    tensors
        The diagnostics as detached scalar tensors on the device of the loss: add these up in a training loop.
    """

    objective: Tensor
    tensors: dict[str, Tensor]

    def __init__(self, objective: Tensor, diagnostics: Mapping[str, Tensor | float]) -> None:
        self.objective = objective
        self.tensors = {
            name: value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            for name, value in diagnostics.items()
        }

    @property
    def reported(self) -> dict[str, Tensor]:
        """The terms as the jobs report them: `loss` is the objective, `elbo` is at beta 1 whatever beta was; means per sample.

        `elbo` is `log_likelihood - kl_divergence`, of a pair the mean over its two samples (`..._x1`, `..._x2`). So rows of runs with
        different beta can be compared. An `elbo` without these terms is passed on as it is. The diagnostics differ: their `elbo` includes
        beta, and is a sum over a pair.
        """
        terms = {"loss": self.objective, **self.tensors}
        if "elbo" in terms:
            views = [end for end in ("", "_x1", "_x2") if {f"log_likelihood{end}", f"kl_divergence{end}"} <= terms.keys()]
            if views:
                elbos = [terms[f"log_likelihood{end}"] - terms[f"kl_divergence{end}"] for end in views]
                terms["elbo"] = elbos[0] if len(elbos) == 1 else torch.stack(elbos).mean()
        return terms

    @property
    def diagnostics(self) -> Mapping[str, float]:
        """The diagnostics as floats. Reading a value waits for the device; `dict(result.diagnostics)` is a plain copy."""
        return Diagnostics(self.tensors)

    def __repr__(self) -> str:
        shape, names = tuple(self.objective.shape), ", ".join(self.tensors)
        return f"LossResult(objective=Tensor(shape={shape}, dtype={self.objective.dtype}), diagnostics=[{names}])"
