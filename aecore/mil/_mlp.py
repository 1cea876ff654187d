"""The fully connected nets of `aecore.mil`; parameter names are those of torchmil, so its state dicts load as they are.

Hidden layers may run under autocast. The last layer gives means and log standard deviations, and runs outside it, in the dtype of its
own weights: a log sigma in bfloat16 has two digits.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from aecore.errors import did_you_mean
from aecore.loss._precision import without_autocast
from aecore.nn._linear import Linear

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "None": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def require_layers(layer_sizes: Sequence[int], activations: Sequence[str]) -> None:
    """Raise ValueError unless there is at least one layer, every size is positive and every layer has a known activation."""
    if not layer_sizes or min(layer_sizes) < 1:
        raise ValueError(f"layer_sizes is {list(layer_sizes)}, expected widths of at least 1, the last one the latent's, such as [128, 64]")
    if len(activations) != len(layer_sizes):
        raise ValueError(
            f"activations has {len(activations)} names ({', '.join(map(str, activations))}), layer_sizes has {len(layer_sizes)} sizes: "
            "give one activation per layer, 'None' for a layer without one"
        )
    for name in activations:
        if name not in ACTIVATIONS:
            raise ValueError(f"unknown activation {name!r}{did_you_mean(str(name), ACTIVATIONS)}")


class MLP(nn.Module):
    """Linear layers of the given widths `(inputs, ..., outputs)`, each followed by its activation."""

    def __init__(self, widths: Sequence[int], activations: Sequence[str]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for (before, after), name in zip(pairwise(widths), activations, strict=True):
            layers += [Linear(before, after), ACTIVATIONS[name]()]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, outputs]` of `[N, inputs]`."""
        *hidden, head, last = self.net
        for layer in hidden:
            x = layer(x)
        assert isinstance(head, nn.Linear)
        with without_autocast(x):
            out: Tensor = last(head(x.to(head.weight.dtype)))
            return out
