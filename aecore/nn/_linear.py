"""`nn.Linear` with the faster of two matrix products: torch's own is MKL, which leaves AVX-512 unused on processors of other makers.

oneDNN, which torch has for convolutions, does not: on an AMD EPYC it takes half the time (128 x 784 by 784 x 256, one thread: 0.24
against 0.49 ms), forward and backward. On an Intel Xeon MKL uses AVX-512 itself and is the faster one (a step of a 784-256-256-20 VAE
takes 1.18 times as long with oneDNN). `linear_path` says which is used and why. It is asked where that pays: float32, outside autocast
and `torch.compile` (which chooses for itself), for products of some size. Everywhere else this is `nn.Linear`, and its weights always are.
"""

from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aecore.errors import ConfigError
from aecore.native import processor
from aecore.store import environment_value

MIN_MULTIPLICATIONS = 1 << 22  # below, asking costs as much as it saves
VARIABLE = "AECORE_LINEAR"  # for tests and benchmarks
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # any: torch's operators have no types


class LinearPath(NamedTuple):
    """Which of the two products large float32 layers use on a CPU, and why; it decides the last bits of what a model computes."""

    name: Literal["onednn", "torch"]
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@cache
def linear_path() -> LinearPath:
    """Return the product that `Linear` uses in this process; ConfigError if AECORE_LINEAR asks for one that is not known.

    The rule is static, by the processor's maker and instructions: one that measured at each start would change the bits of a run.
    """
    return _choose_path(environment_value(VARIABLE) or "")


def _choose_path(wanted: str) -> LinearPath:
    if wanted == "onednn" and _ONEDNN is None:
        raise ConfigError(f"{VARIABLE}={wanted} is no matrix product of this build of torch (known: torch): correct or unset it")
    if wanted == "torch":
        return LinearPath("torch", f"{VARIABLE}=torch")
    if wanted == "onednn":
        return LinearPath("onednn", f"{VARIABLE}=onednn")
    vendor, capability = processor().vendor, torch.backends.cpu.get_cpu_capability()
    if _ONEDNN is None or not torch._C.has_mkl:
        return LinearPath("torch", "this build of torch does not have both products")
    if capability != "AVX512":
        return LinearPath("torch", "no AVX-512")
    if vendor != "AuthenticAMD":  # the only maker for which oneDNN was measured to be faster
        return LinearPath("torch", f"{vendor or 'unknown maker'} with AVX-512: oneDNN is slower there or was not measured")
    return LinearPath("onednn", f"{vendor} with AVX-512, which MKL leaves unused")


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
        x.numel() * weight.shape[0] >= MIN_MULTIPLICATIONS
        and x.shape[-1:] == weight.shape[1:]  # else torch's own message
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and linear_path().name == "onednn"
    )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b^T + bias of `a [M, K]` and `b [N, K]`."""
    if torch.is_grad_enabled():
        return _Product.apply(a, b, bias)  # type: ignore[no-any-return, no-untyped-call]  # torch
    return _ONEDNN(_dense(a), _dense(b), bias, "none", [], "")  # type: ignore[no-any-return]  # torch's operators have no types


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
