import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import aecore.nn._linear as linear_module
from aecore.errors import ConfigError
from aecore.native import Processor
from aecore.nn._linear import VARIABLE, LazyLinear, Linear, linear, linear_path
from aecore.training.loop import fit
from tests.aecore.encoding import encode, sprites_dataset
from tests.aecore.training import small_job
from tests.documents import content, rewrite

here = pytest.mark.skipif(linear_module._ONEDNN is None, reason="this build of torch has only one matrix product")


@pytest.fixture(autouse=True)
def chosen_anew():
    yield
    linear_path.cache_clear()


@pytest.fixture(params=["onednn", "torch"])
def always(request, monkeypatch):
    """Every product in one of the two ways, whatever its size."""
    if request.param == "onednn":
        if linear_module._ONEDNN is None:
            pytest.skip("this build of torch has only one matrix product")
        monkeypatch.setattr(linear_module, "MIN_MULTIPLICATIONS", 1)
    use(monkeypatch, request.param)


def use(monkeypatch, path):
    monkeypatch.setenv(VARIABLE, path)
    linear_path.cache_clear()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def random(*shape, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 17), (1, 17), (0, 17), (17,), (3, 4, 17), (2, 1, 3, 17)])
def test_values_and_gradients_are_those_of_torch(always, shape, bias):
    ours, theirs = Linear(17, 9, bias=bias), nn.Linear(17, 9, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, y = random(*shape).requires_grad_(), random(*shape).requires_grad_()
    weights = random(*shape[:-1], 9)
    (ours(x) * weights).sum().backward()
    (theirs(y) * weights).sum().backward()
    close(ours(x), theirs(y))
    close(x.grad, y.grad)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(mine.grad, other.grad)
        assert mine.grad.stride() == other.grad.stride()
    with torch.inference_mode():
        close(ours(x), theirs(y))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x[:, :1].expand(-1, x.shape[1]),
        lambda x: x[:1].expand(len(x), -1),
        lambda x: torch.cat([x, x], 1)[:, ::2],
        lambda x: torch.cat([x, x])[::2],
        lambda x: x[:, 1:],
    ],
)
def test_any_layout_in_memory_will_do(always, make):
    x, weight, bias = make(random(12, 31)), random(8, 30 if make(random(12, 31)).shape[1] == 30 else 31), random(8)
    close(linear(x, weight, bias), F.linear(x, weight, bias))
    close(linear(x, weight.t().contiguous().t(), bias), F.linear(x, weight, bias))
    leaf = weight.clone().requires_grad_()
    linear(x, leaf, bias).sum().backward()  # the gradient of a sum is one number, expanded
    close(leaf.grad, torch.ones(len(x), 8).t() @ x)


def test_it_is_differentiable_twice(always):
    x, weight, bias = random(4, 6).requires_grad_(), random(3, 6).requires_grad_(), random(3).requires_grad_()

    def penalty(function):
        (slope,) = torch.autograd.grad(function(x, weight, bias).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (x, weight, bias))

    for ours, theirs in zip(penalty(linear), penalty(F.linear), strict=True):
        close(ours, theirs)


def test_only_what_needs_a_gradient_gets_one(always):
    layer = Linear(6, 3)
    layer.weight.requires_grad_(False)
    x = random(4, 6)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is None
    assert torch.equal(layer.bias.grad, torch.full((3,), 4.0))


def test_transforms_of_functions_work(always):
    layer, x = Linear(6, 3), random(4, 6)
    parameters = dict(layer.named_parameters())

    def loss(parameters, row):
        return functional_call(layer, parameters, row.unsqueeze(0)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        close(each[name].sum(0), parameter.grad)


@here
def test_large_products_take_the_fast_way_and_everything_else_torchs(monkeypatch):
    use(monkeypatch, "onednn")
    calls, multiply = [], linear_module._ONEDNN
    monkeypatch.setattr(linear_module, "_ONEDNN", lambda *args: calls.append(args[0].shape) or multiply(*args))
    x, weight = random(64, 256), random(256, 256)

    def fast(x, weight):
        calls.clear()
        linear(x, weight)
        return bool(calls)

    assert fast(x, weight)
    assert not fast(x[:63], weight)
    assert not fast(x.double(), weight.double())
    assert not fast(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16 and not fast(x, weight)
    torch._C._set_mkldnn_enabled(False)  # the context manager of torch.backends.mkldnn warns on CPUs
    try:
        assert not fast(x, weight)
    finally:
        torch._C._set_mkldnn_enabled(True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[:, :-1], weight)


def test_weights_are_those_of_nn_linear():
    torch.manual_seed(1)
    ours = Linear(7, 5)
    torch.manual_seed(1)
    theirs = nn.Linear(7, 5)
    assert isinstance(ours, nn.Linear)
    assert all(torch.equal(mine, other) for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_layer_becomes_a_linear_of_ours():
    layer = LazyLinear(5)
    assert layer(random(2, 7)).shape == (2, 5)
    assert type(layer) is Linear and layer.in_features == 7


class TestPath:
    """Which product is used follows from the processor alone, and says why."""

    @pytest.fixture
    def path_on(self, monkeypatch):
        monkeypatch.delenv(VARIABLE, raising=False)
        monkeypatch.setattr(linear_module, "_ONEDNN", object())

        def path(vendor, capability, mkl=True):
            monkeypatch.setattr(linear_module, "processor", lambda: Processor(vendor, "a processor"))
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
            monkeypatch.setattr(torch._C, "has_mkl", mkl)
            return linear_path.__wrapped__()

        return path

    def test_onednn_is_used_only_on_the_maker_for_which_it_was_measured_to_be_faster(self, path_on):
        assert path_on("AuthenticAMD", "AVX512").name == "onednn"
        others = (("GenuineIntel", "AVX512"), ("", "AVX512"), ("CentaurHauls", "AVX512"), ("AuthenticAMD", "AVX2"), ("", "DEFAULT"))
        assert {path_on(*other).name for other in others} == {"torch"}
        assert path_on("AuthenticAMD", "AVX512", mkl=False).name == "torch"

    def test_the_reason_names_what_decided(self, path_on):
        assert "AuthenticAMD with AVX-512" in str(path_on("AuthenticAMD", "AVX512"))
        assert "GenuineIntel" in path_on("GenuineIntel", "AVX512").reason
        assert "no AVX-512" in path_on("GenuineIntel", "AVX2").reason

    @here
    @pytest.mark.parametrize("wanted", ["torch", "onednn"])
    def test_an_environment_variable_decides_for_benchmarks(self, monkeypatch, wanted):
        use(monkeypatch, wanted)
        assert tuple(linear_path()) == (wanted, f"AECORE_LINEAR={wanted}")

    def test_an_unknown_product_is_refused_with_the_known_ones(self, monkeypatch):
        use(monkeypatch, "mkl")
        with pytest.raises(ConfigError, match=r"AECORE_LINEAR is 'mkl', expected torch or onednn"):
            linear_path()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sprites_dataset(tmp_path_factory.mktemp("linear") / "data", num_samples=60)


class TestRecord:
    def test_a_run_and_its_table_say_which_product_made_them(self, data, tmp_path, monkeypatch):
        use(monkeypatch, "torch")
        fit(small_job(data, tmp_path / "run", max_steps=2))
        claim = json.loads((tmp_path / "run/run.000001.json").read_text())
        assert claim["info"]["linear"] == "torch (AECORE_LINEAR=torch)"
        assert "linear" not in claim["identity"] and "AECORE_LINEAR" not in str(claim["identity"])
        (producer,) = encode(str(tmp_path / "run"), data, tmp_path / "table").manifest.lineage["encoded_by"]
        assert json.loads(producer["versions"])["linear"] == "torch"

    def test_a_run_that_does_not_say_it_is_opened_as_before(self, data, tmp_path, caplog):
        job = small_job(data, tmp_path / "run", max_steps=2)
        first = fit(job)
        path = tmp_path / "run/run.000001.json"
        info = content(path)["info"]
        del info["linear"]
        rewrite(path, info=info)
        shutil.rmtree(tmp_path / "run/model")  # as if it had been stopped before it was published
        assert fit(job).metrics == first.metrics
        assert "matrix product" not in caplog.text

    @here
    def test_a_run_that_goes_on_with_the_other_product_warns(self, data, tmp_path, monkeypatch, caplog):
        use(monkeypatch, "torch")
        job = small_job(data, tmp_path / "run", max_steps=2)
        fit(job)
        use(monkeypatch, "onednn")
        fit(job)
        assert "matrix product" not in caplog.text, "it is finished"
        shutil.rmtree(tmp_path / "run/model")
        fit(job)
        assert "began with the matrix product torch (AECORE_LINEAR=torch) and continues with onednn" in caplog.text
