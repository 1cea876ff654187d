"""What the page "Base Classes & Utilities" of PyAutoencoder promises, point by point, with the imports changed."""

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aecore._base import BaseAutoencoder, ModelOutput
from aecore.loss import LossResult


@dataclass(slots=True, repr=False)
class Output(ModelOutput):
    x_hat: Tensor | None = None
    z: Tensor | None = None
    note: str = "plain"


class Mine(BaseAutoencoder):
    """A user's own autoencoder of lazy layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LazyLinear(3)
        self.decoder = nn.LazyLinear(7)
        self.grad_enabled: list[bool] = []

    def _encode(self, x: Tensor, *args: Any, scale: float = 1.0, **kwargs: Any) -> Output:
        self.grad_enabled.append(torch.is_grad_enabled())
        return Output(z=self.encoder(x) * scale)

    def _decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Output:
        return Output(x_hat=self.decoder(z))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Output:
        z = self._encode(x).z
        assert z is not None
        return Output(x_hat=self._decode(z).x_hat, z=z)

    def compute_loss(self, x: Tensor, output: Output, *args: Any, **kwargs: Any) -> LossResult:
        assert output.x_hat is not None
        error = (x - output.x_hat).square().mean()
        return LossResult(error, {"error": error})


def test_it_is_an_abstract_module() -> None:
    assert issubclass(BaseAutoencoder, nn.Module)
    assert BaseAutoencoder.__abstractmethods__ == {"_encode", "_decode", "forward", "compute_loss"}
    with pytest.raises(TypeError, match="abstract"):
        BaseAutoencoder()  # type: ignore[abstract]  # the mistake under test


def test_forward_has_gradients_and_encode_and_decode_have_none() -> None:
    torch.manual_seed(0)
    model, x = Mine(), torch.rand(4, 7)
    model.build(x)
    model.compute_loss(x, model(x)).objective.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    z = model.encode(x).z
    assert z.is_inference() and model.decode(z).x_hat.is_inference()
    torch.testing.assert_close(model.encode(x, scale=2.0).z, 2 * z)


def test_build_materialises_lazy_layers_and_only_the_shape_matters() -> None:
    model = Mine()
    model.build(input_sample=torch.full((1, 7), torch.nan))
    assert model.encoder.weight.shape == (3, 7)
    assert model.grad_enabled == [False]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_load_state_dict_wants_build_first_and_returns_the_keys() -> None:
    model, built = Mine(), Mine()
    built.build(torch.zeros(1, 7))
    parameters = inspect.signature(BaseAutoencoder.load_state_dict).parameters
    assert [(p.name, p.default) for p in parameters.values()][2:] == [("strict", True), ("assign", False)]
    with pytest.raises(RuntimeError, match=r"build\(\)"):
        model.load_state_dict({}, strict=False)
    model.build(torch.zeros(1, 7))
    result = model.load_state_dict({**built.state_dict(), "unknown": torch.zeros(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["unknown"])
    assert torch.equal(model.encoder.weight, built.encoder.weight)


def test_outputs_print_shapes_and_types_of_tensors_and_other_fields_by_repr() -> None:
    shown = repr(Output(x_hat=torch.zeros(2, 3), note="a note"))
    assert shown == "Output(x_hat=Tensor(shape=(2, 3), dtype=torch.float32), z=None, note='a note')"
