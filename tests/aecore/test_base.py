"""The base class: inference without gradients, build, loading, outputs."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from aecore._base import Trainable
from aecore._base.base import BaseAutoencoder, ModelOutput
from aecore._base.batch import Batch
from aecore.loss import LossResult
from aecore.vanilla import AE
from aecore.variational import VAE

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


@dataclass(slots=True, eq=False)
class Pair(ModelOutput):
    z: Tensor
    note: str


class Recorder(BaseAutoencoder):
    """Notes which arguments and modes it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(3), nn.Dropout(0.5))
        self.calls: list[tuple[object, ...]] = []

    def _encode(self, x: Tensor, *args: object, **kwargs: object) -> Pair:
        self.calls.append(("encode", args, kwargs, self.training))
        return Pair(self.net(x), "encoded")

    def _decode(self, z: Tensor, *args: object, **kwargs: object) -> Pair:
        self.calls.append(("decode", args, kwargs, self.training))
        return Pair(z * 2, "decoded")

    def forward(self, x: Tensor) -> Pair:
        self.calls.append(("forward", self.training, torch.is_grad_enabled()))
        return Pair(self.net(x), "forward")

    def compute_loss(self, x: Tensor, output: Pair, weight: float = 1.0) -> LossResult:
        mean = output.z.mean()
        return LossResult(weight * mean, {"mean": mean})


class Broken(Recorder):
    def forward(self, x: Tensor) -> Pair:
        raise ZeroDivisionError


def test_base_class_names_the_four_methods_to_implement() -> None:
    assert BaseAutoencoder.__abstractmethods__ == {"_encode", "_decode", "forward", "compute_loss"}
    with pytest.raises(TypeError, match="abstract"):
        BaseAutoencoder()  # type: ignore[abstract]  # that is the point


def test_encode_and_decode_pass_arguments_on_and_keep_the_mode() -> None:
    model = Recorder()
    model.build(torch.zeros(2, 5))
    for training in (True, False):
        model.train(training).calls.clear()
        assert model.encode(torch.zeros(2, 5), 7, flag=True).z.is_inference()
        assert model.decode(torch.ones(2, 3), "s", key=1).z.is_inference()
        assert model.calls == [("encode", (7,), {"flag": True}, training), ("decode", ("s",), {"key": 1}, training)]
        assert all(module.training is training for module in model.modules())


def test_build_runs_one_forward_without_gradients_in_eval_mode_and_restores_every_mode() -> None:
    model = Recorder()
    model.net[1].eval()
    model.build(torch.zeros(2, 5))
    assert model.calls == [("forward", False, False)]
    assert (model.training, model.net.training, model.net[1].training) == (True, True, False)
    assert model.net[0].weight.shape == (3, 5)


def test_build_restores_every_mode_when_the_forward_fails() -> None:
    model = Broken()
    model.net.eval()
    with pytest.raises(ZeroDivisionError):
        model.build(torch.zeros(2, 5))
    assert (model.training, model.net.training) == (True, False)


def test_build_leaves_batch_statistics_alone() -> None:
    model = AE(nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4)), nn.Linear(4, 6))
    model.build(torch.ones(3, 6))
    assert model.encoder[1].num_batches_tracked == 0


@pytest.mark.parametrize("outer", [torch.inference_mode, torch.no_grad])
def test_layers_materialised_outside_training_can_still_be_trained(outer: type[torch.inference_mode]) -> None:
    x, model, encoded_first = torch.ones(2, 5), Recorder().eval(), Recorder().eval()
    with outer():
        model.build(x)
        encoded_first.encode(x)
    for built in (model, encoded_first):
        built.compute_loss(x, built(x)).objective.backward()
        assert built.net[0].weight.grad is not None


def test_loading_returns_missing_and_unexpected_keys_as_torch_does() -> None:
    model = AE(nn.Linear(2, 1), nn.Linear(1, 2))
    state = model.state_dict()
    state["extra"] = state.pop("encoder.bias")
    result = model.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["encoder.bias"], ["extra"])
    with pytest.raises(RuntimeError, match="extra"):
        model.load_state_dict(state)


def test_loading_a_full_state_dict_materialises_lazy_layers() -> None:
    trained, fresh = Recorder(), Recorder()
    trained.build(torch.zeros(2, 5))
    fresh.load_state_dict(trained.state_dict())
    x = torch.randn(2, 5)
    assert torch.equal(trained.eval()(x).z, fresh.eval()(x).z)


def test_loading_names_the_lazy_layers_that_remain_without_weights() -> None:
    vae = VAE(nn.Linear(4, 3), nn.Linear(2, 4), latent_dim=2)
    with pytest.raises(RuntimeError, match=r"Call build\(\) before load_state_dict\(\).*sampling_layer\.mu.*sampling_layer\.log_var"):
        vae.load_state_dict({}, strict=False)


def test_loading_with_assign_takes_the_given_tensors() -> None:
    model = AE(nn.Linear(2, 1), nn.Linear(1, 2))
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model.encoder.weight.dtype == torch.float64


def test_outputs_print_tensors_by_shape_and_dtype_and_other_fields_by_repr() -> None:
    nested = Pair(torch.zeros(2, 3, dtype=torch.float64), "it's")
    assert repr(nested) == 'Pair(z=Tensor(shape=(2, 3), dtype=torch.float64), note="it\'s")'
    assert isinstance(nested, ModelOutput)


def test_outputs_have_slots() -> None:
    assert not hasattr(Pair(torch.zeros(1), ""), "__dict__")
    with pytest.raises(AttributeError):
        Pair(torch.zeros(1), "").other = 1  # type: ignore[attr-defined]  # that is the point


def test_models_satisfy_the_interface_of_the_trainer() -> None:
    models: list[Trainable] = [AE(nn.Identity(), nn.Identity()), VAE(nn.Identity(), nn.Identity(), 3)]
    assert [model.noise_shape(4) for model in models] == [None, (4, 3)]
    assert {model.train_inputs for model in models} | {model.encode_inputs for model in models} == {("x",)}


def test_a_batch_in_pieces_has_the_rows_of_the_whole_and_its_place_in_the_global_batch() -> None:
    x, rows = torch.arange(14).reshape(7, 2), torch.arange(7)
    batch = Batch(x, rows, rows + 10, 70, label=rows % 3)
    pieces = batch.split(3)
    assert [len(piece) for piece in pieces] == [3, 3, 1]
    for name in ("x", "ordinals", "positions", "label"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name)), name
    assert all(piece.num_global == 70 and piece.x_pair is None and piece.lengths is None for piece in pieces)
    assert batch.split(7)[0] is batch
    with pytest.raises(AssertionError, match="batch of bags"):
        Batch(x, rows, rows, 7, mask=rows > 3).split(2)
