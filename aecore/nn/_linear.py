"""`nn.Linear` with the faster of two matrix products: torch's own is MKL, which leaves AVX-512 unused on CPUs of other makers.

oneDNN, which torch has for convolutions, does not: on an AMD EPYC it takes half the time (128 x 784 by 784 x 256, one thread: 0.24
against 0.49 ms), forward and backward. It is asked where that pays: float32 on a CPU with AVX-512, outside autocast and `torch.compile`
(which chooses for itself), for products of some size. Everywhere else this is `nn.Linear`, and its weights always are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_MULTIPLICATIONS = 1 << 22  # below, asking costs as much as it saves
_multiply = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.cpu.get_cpu_capability() == "AVX512" else None


class Linear(nn.Linear):
    """y = x A^T + b for `x [..., in_features]`; parameters, initial values and state dict are those of `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        return linear(input, self.weight, self.bias)


class LazyLinear(nn.LazyLinear):
    """A `Linear` that learns `in_features` from its first input."""

    cls_to_become = Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x A^T + b, `[..., out]`, of `x [..., in]`, `weight [out, in]`, `bias [out]`, as `torch.nn.functional.linear` does."""
    if torch.compiler.is_compiling() or not _pays(x, weight):
        return F.linear(x, weight, bias)
    product = _product(x.reshape(-1, x.shape[-1]), weight, bias)
    return product if x.ndim == 2 else product.reshape(*x.shape[:-1], -1)


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        _multiply is not None
        and x.numel() * weight.shape[0] >= MIN_MULTIPLICATIONS
        and x.shape[-1:] == weight.shape[1:]  # else torch's own message
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b^T + bias of `a [M, K]` and `b [N, K]`."""
    if torch.is_grad_enabled():
        return _Product.apply(a, b, bias)  # type: ignore[no-any-return, no-untyped-call]  # torch
    return _multiply(_dense(a), _dense(b), bias, "none", [], "")  # type: ignore[no-any-return, misc]  # torch's operators have no types


def _dense(matrix: Tensor) -> Tensor:
    """Return the matrix with its rows or its columns one after the other in memory."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


class _Product(torch.autograd.Function):
    """Differentiable any number of times: its gradients are such products again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:  # any: torch's context
        ctx.save_for_backward(a, b)
        return _product(a, b, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # any: as above; one to three gradients
        a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_a = _product(gradient, b.t()) if needs[0] else None
        of_b = _product(gradient.t(), a.t()) if needs[1] else None
        return of_a, of_b, gradient.sum(0) if needs[2] else None
