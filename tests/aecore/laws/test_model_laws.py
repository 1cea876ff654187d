"""Laws that hold for every registered model on every registered backbone, for samples of several shapes."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from aecore._base import Batch
from aecore.errors import ConfigError
from aecore.loss import LossResult
from aecore.registry import BACKBONES, MODELS

SMALL = [(1, 28, 28), (3, 32, 32), (1, 35, 35), (17,)]
SHAPES = [*SMALL, (1, 105, 105)]
N, LATENT = 4, 6


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def taken(kind: str, backbone: str, shape: tuple[int, ...]) -> bool:
    """Which model takes which backbone for which samples: all but these, so that a refusal by mistake is a failure."""
    if kind == "mil_vae":  # torchmil's form consists of MLPs
        return backbone == "mlp"
    if kind == "rvae" and backbone not in ("recurrent", "hybrid"):  # nothing else runs over lengths
        return False
    return backbone != "hybrid" or len(shape) == 3  # frames


def named(kind: str, backbone: str) -> tuple[object, object]:
    """Return the specs of a pair, otherwise as they are by default."""
    return MODELS.from_dict({"kind": kind, "latent_dim": LATENT, "likelihood": "bernoulli"}), BACKBONES.spec_type(backbone)()


def make(kind: str, backbone: str, shape: tuple[int, ...]) -> nn.Module:
    built: nn.Module = MODELS.build(*named(kind, backbone), shape)
    return built


def batch_of(model: nn.Module, *shape: int) -> Batch:
    """Samples, and what else the model trains on: partners, labels."""
    rows, inputs = torch.arange(shape[0]), model.train_inputs
    return Batch(
        torch.rand(shape),
        rows,
        rows,
        shape[0],
        x_pair=torch.rand(shape) if "x_pair" in inputs else None,
        label=rows % 2 if "label" in inputs else None,
    )


def part_of(batch: Batch, rows: slice) -> Batch:
    per_row = {name: getattr(batch, name) for name in ("x", "ordinals", "positions", "x_pair", "label", "mask", "lengths")}
    return Batch(num_global=batch.num_global, **{name: None if value is None else value[rows] for name, value in per_row.items()})


def noise(model: nn.Module, batch: Batch, num_samples: int = 1) -> Tensor | None:
    shape = model.noise_shape(num_samples)
    views = () if batch.x_pair is None else (2,)
    return None if shape is None else torch.randn(len(batch), *views, *shape)


def loss_of(model: nn.Module, batch: Batch, **options: object) -> LossResult:
    """The loss in training mode; state that training updates without gradients (a codebook) is restored, so that losses can be compared."""
    with buffers_put_back(model):
        result: LossResult = model.loss(batch, **options)
    return result


@contextlib.contextmanager
def buffers_put_back(model: nn.Module) -> Iterator[None]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """The reconstruction of the (first) input as `forward` gives it."""
    if batch.x_pair is None:
        return model(batch.x, *([] if batch.label is None else [batch.label])).x_hat
    return model((batch.x, batch.x_pair)).output1.x_hat


ALL = list(itertools.product(MODELS.kinds(), BACKBONES.kinds(), SHAPES))
REFUSED = [which for which in ALL if not taken(*which)]


def every(*shapes: tuple[int, ...]) -> pytest.MarkDecorator:
    """Run a test for every model on every backbone that takes samples of these shapes; by default all of `SHAPES`."""
    which = [which for which in ALL if taken(*which) and which[2] in (shapes or SHAPES)]
    return pytest.mark.parametrize(("kind", "backbone", "shape"), which, ids=_name)


def a_few(*shapes: tuple[int, ...]) -> pytest.MarkDecorator:
    """As `every`, where each takes a second: every model on one backbone, and a VAE on every backbone; the other pairs are `long`."""
    which = [which for which in ALL if taken(*which) and which[2] in shapes]
    first = {kind: (kind, backbone) for kind, backbone, _ in sorted(which, key=lambda each: each[1] != "mlp")[::-1]}
    chosen = [
        pytest.param(*each, marks=() if each[0] == "vae" or each[:2] == first[each[0]] else pytest.mark.long, id="-".join(map(_name, each)))
        for each in which
    ]
    return pytest.mark.parametrize(("kind", "backbone", "shape"), chosen)


def _name(value: object) -> str:
    return value if isinstance(value, str) else "x".join(map(str, value))


@every()
def test_built_model_gives_back_the_shape_and_finite_flat_float32_latents(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape)
    assert not any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters())
    for rows in (N, 1):
        batch = batch_of(model, rows, *shape)
        reconstruction = model.eval().reconstruct(batch, likelihood="bernoulli")
        assert (reconstruction.shape, reconstruction.dtype) == ((rows, *shape), torch.float32)
        assert 0 <= reconstruction.min() <= reconstruction.max() <= 1
        assert tuple(model.latents(batch)) == MODELS.spec_type(kind)().columns
        for latent in model.latents(batch).values():
            assert latent.ndim == 2 and len(latent) == rows
            assert latent.dtype in (torch.float32, torch.int32)  # codes of a codebook are numbers of its entries
            assert latent.isfinite().all()
        assert forward(model, batch).shape[-len(shape) :] == shape


@pytest.mark.parametrize(("kind", "backbone", "shape"), REFUSED, ids=_name)
def test_what_does_not_go_together_is_refused(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.kind"):
        MODELS.build(*named(kind, backbone), shape)


@every((17,))
def test_a_build_function_says_which_class_it_returns(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    assert MODELS.built_type(kind) is type(make(kind, backbone, shape))


@every(*SMALL)
def test_gradient_reaches_every_parameter(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape)
    batch = batch_of(model, N, *shape)
    model.loss(batch, eps=noise(model, batch), likelihood="bernoulli").objective.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every((1, 28, 28))
def test_evaluation_is_deterministic_and_leaves_the_model_as_it_was(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape).eval()
    batch = batch_of(model, N, *shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = model.latents(batch), model.latents(batch)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(model.reconstruct(batch), model.reconstruct(batch))
    assert torch.equal(forward(model, batch), forward(model, batch))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@every(*SMALL)
def test_decoded_latents_are_the_reconstruction(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape).eval()
    batch = batch_of(model, N, *shape)
    latent = next(value for name, value in model.latents(batch).items() if name != "log_var")
    decoded = model.decode_latents(latent, label=batch.label, likelihood="bernoulli")
    torch.testing.assert_close(decoded, model.reconstruct(batch, likelihood="bernoulli"))


@every((3, 32, 32))
def test_rows_do_not_depend_on_their_batch(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape).eval()
    batch = batch_of(model, N, *shape)
    alone = model.latents(part_of(batch, slice(1)))
    for name, latent in model.latents(batch).items():
        torch.testing.assert_close(latent[:1], alone[name], rtol=1e-4, atol=1e-5)


@every((17,))
def test_mean_loss_of_two_halves_is_the_loss_of_the_whole(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape)
    batch = batch_of(model, N, *shape)
    eps = noise(model, batch, num_samples=3)

    def loss(rows: slice) -> Tensor:
        return loss_of(model, part_of(batch, rows), eps=None if eps is None else eps[rows], likelihood="bernoulli").objective

    torch.testing.assert_close(loss(slice(0, 1)) / 4 + 3 * loss(slice(1, N)) / 4, loss(slice(0, N)))


@every((17,))
def test_loss_of_many_samples_is_the_mean_of_the_losses_of_each(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape)
    batch = batch_of(model, N, *shape)
    eps = noise(model, batch, num_samples=3)
    together = loss_of(model, batch, eps=eps).objective
    axis = 0 if eps is None else eps.ndim - len(model.noise_shape())
    each = [loss_of(model, batch, eps=None if eps is None else eps.narrow(axis, s, 1)).objective for s in range(3)]
    torch.testing.assert_close(together, torch.stack(each).mean())


@every((1, 28, 28))
def test_saved_and_loaded_model_is_equal_to_the_bit(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape)
    batch = batch_of(model, N, *shape)
    other = make(kind, backbone, shape)
    assert not all(torch.equal(a, b) for a, b in zip(model.latents(batch).values(), other.latents(batch).values(), strict=True))
    result = other.load_state_dict(model.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    expected, loaded = model.eval().latents(batch), other.eval().latents(batch)
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    assert torch.equal(model.reconstruct(batch), other.reconstruct(batch))


@every(*SMALL)
def test_a_small_step_against_the_gradient_lowers_the_loss(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape)
    batch = batch_of(model, N, *shape)
    eps = noise(model, batch)
    before = loss_of(model, batch, eps=eps, likelihood="bernoulli").objective
    before.backward()
    slope = sum(parameter.grad.square().sum() for parameter in model.parameters())
    torch.optim.SGD(model.parameters(), lr=(1e-4 * before / slope).item()).step()  # to the first order, the loss falls by a ten-thousandth
    assert loss_of(model, batch, eps=eps, likelihood="bernoulli").objective < before


@every((1, 28, 28))
def test_bf16_autocast_stays_finite_with_a_kl_that_is_not_negative(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape)
    batch = batch_of(model, N, *shape)
    eps = noise(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss_of(model, batch, eps=eps, likelihood="bernoulli")
        latents = model.latents(batch)
    assert result.objective.dtype == torch.float32
    result.objective.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(latent.dtype in (torch.float32, torch.int32) and latent.isfinite().all() for latent in latents.values())
    assert all(value >= 0 for name, value in result.diagnostics.items() if name.startswith("kl_divergence"))
    full = model.loss(batch, eps=eps, likelihood="bernoulli").objective
    torch.testing.assert_close(result.objective, full, rtol=0.02, atol=0)


@a_few((1, 28, 28))
def test_forward_and_loss_compile_to_one_graph_for_every_beta(kind: str, backbone: str, shape: tuple[int, ...]) -> None:
    model = make(kind, backbone, shape)
    batch = batch_of(model, N, *shape)
    eps, graphs = noise(model, batch), 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    torch._dynamo.reset()
    compiled = torch.compile(lambda beta: model.loss(batch, eps=eps, beta=beta, likelihood="bernoulli"), backend=count, fullgraph=True)
    for beta in (torch.tensor(0.5), torch.tensor(2.0)):
        expected = loss_of(model, batch, eps=eps, beta=beta, likelihood="bernoulli")
        with buffers_put_back(model):
            result = compiled(beta)
        torch.testing.assert_close(result.objective, expected.objective)
        assert dict(result.diagnostics) == pytest.approx(dict(expected.diagnostics))
    assert graphs == 1
