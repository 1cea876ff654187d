"""The VAE of bags: what it gives for instances, mask and bags of several latents."""

import pytest
import torch

from aecore.errors import InputError
from aecore.mil import VariationalAutoEncoder, VariationalAutoEncoderMIL

B, N, F, D, S = 3, 6, 12, 4, 5
SIZES = torch.tensor([6, 2, 1])
MASK = torch.arange(N) < SIZES[:, None]


@pytest.fixture(autouse=True)
def _a_fixed_seed():
    torch.manual_seed(0)


def small(covar_mode: str = "diagonal", **options) -> VariationalAutoEncoderMIL:
    return VariationalAutoEncoderMIL(**{"input_shape": (F,), "layer_sizes": [8, D], "covar_mode": covar_mode, **options})


def quiet(model: VariationalAutoEncoderMIL) -> VariationalAutoEncoderMIL:
    """The model with a posterior that has hardly any width: a sample is the mean of its instance."""
    with torch.no_grad():
        model.encoder.net[2].weight[D:] = 0.0
        model.encoder.net[2].bias[D:] = -12.0
    return model


def seeded(call, *args, **kwargs):
    torch.manual_seed(7)
    return call(*args, **kwargs)


@pytest.mark.parametrize("covar_mode", ["single", "diagonal"])
def test_shapes_are_those_of_the_documentation(covar_mode):
    model, X = small(covar_mode), torch.randn(B, N, F)
    assert model(X, S).shape == (B, N, S, D)
    assert [part.shape for part in model(X, S, True)] == [(B, N, S, D), (B, N, D), (B, N, D)]
    assert model.complete_forward_samples(X).shape == (B, N, F)
    assert model.log_marginal_likelihood_importance_sampling(X, MASK, 7).shape == (B, N)
    loss, samples = model.compute_loss(X, MASK, "mean", S, True)
    assert list(loss) == ["VaeELL", "VaeKL"]
    assert [value.shape for value in loss.values()] == [(), ()]
    assert samples.shape == (B, N, S, D)
    assert [value.shape for value in model.compute_loss(X, MASK, "none").values()] == [(B, N), (B, N)]


def test_sample_s_of_instance_i_belongs_to_it():
    model, X = quiet(small()), 10 * torch.randn(B, N, F)
    mean, _ = model.get_raw_output_enc(X.flatten(0, 1))
    expected = mean.reshape(B, N, 1, D).expand(-1, -1, S, -1)
    torch.testing.assert_close(model(X, S), expected, atol=1e-3, rtol=1e-3)
    _, samples = model.compute_loss(X, MASK, n_samples=S, return_samples=True)
    torch.testing.assert_close(samples[MASK], expected[MASK], atol=1e-3, rtol=1e-3)
    assert not samples[~MASK].any()


def test_instances_of_bags_are_what_they_are_alone():
    model, X = quiet(small()), torch.randn(B, N, F)
    alone = VariationalAutoEncoder((F,), [8, D], covar_mode="diagonal")
    alone.load_state_dict(model.state_dict())
    flat = X.flatten(0, 1)
    for name, values in alone.compute_loss(flat, "none").items():
        torch.testing.assert_close(model.compute_loss(X, reduction="none")[name], values.reshape(B, N), atol=2e-3, rtol=0)
    torch.testing.assert_close(model.complete_forward_samples(X).flatten(0, 1), alone.complete_forward_samples(flat), atol=1e-3, rtol=0)
    found = seeded(model.log_marginal_likelihood_importance_sampling, X, None, 20)
    torch.testing.assert_close(found.flatten(), seeded(alone.log_marginal_likelihood_importance_sampling, flat, 20))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("garbage", [0.0, 1e6, float("nan")])
def test_masked_instances_change_neither_loss_nor_gradient(reduction, garbage):
    model, X = small(), torch.randn(B, N, F)
    other = torch.where(MASK[..., None], X, garbage).requires_grad_()
    gradients = []
    for bags in (X, other):
        model.zero_grad()
        loss = seeded(model.compute_loss, bags, MASK, reduction, S)
        sum(value.sum() for value in loss.values()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        gradients[-1] += [value.detach() for value in loss.values()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
    assert not other.grad[~MASK].any()
    assert other.grad[MASK].any()
    unmasked = seeded(model.compute_loss, X, None, reduction, S)
    assert not torch.equal(unmasked["VaeKL"], loss["VaeKL"]), "without the mask padding counts"


def test_mean_is_over_instances_and_none_is_zero_for_padding():
    model, X = small(), torch.randn(B, N, F)
    none, total, mean = (seeded(model.compute_loss, X, MASK, reduction, S) for reduction in ("none", "sum", "mean"))
    for name, values in none.items():
        assert not values[~MASK].any()
        torch.testing.assert_close(total[name], values.sum())
        torch.testing.assert_close(mean[name], values.sum() / SIZES.sum())


@pytest.mark.parametrize("mask", [MASK, MASK.int(), MASK.float()], ids=["bool", "int", "float"])
def test_masks_are_booleans_or_zeros_and_ones(mask):
    model, X = small(), torch.randn(B, N, F)
    loss = seeded(model.compute_loss, X, mask)
    assert all(torch.equal(value, seeded(model.compute_loss, X, MASK)[name]) for name, value in loss.items())


def test_log_likelihood_of_padding_is_zero_and_that_of_instances_does_not_see_it():
    model, X = small(), torch.randn(B, N, F)
    found = seeded(model.log_marginal_likelihood_importance_sampling, X, MASK, 50)
    other = seeded(model.log_marginal_likelihood_importance_sampling, torch.where(MASK[..., None], X, torch.nan), MASK, 50)
    assert torch.equal(found, other)
    assert not found[~MASK].any()
    assert (found[MASK] < 0).all()


def test_bags_of_images_come_back_as_images():
    model, X = small(input_shape=(3, 2, 2)), torch.randn(B, N, 3, 2, 2)
    assert model.complete_forward_samples(X).shape == X.shape
    assert model(X, S).shape == (B, N, S, D)
    assert model.log_marginal_likelihood_importance_sampling(X, MASK).shape == (B, N)
    assert model.compute_loss(X, MASK)["VaeELL"].isfinite()


def test_wrong_bags_and_masks_are_refused_with_what_was_expected():
    model, X = small(), torch.randn(B, N, F)
    for call in (model, model.compute_loss, model.complete_forward_samples, model.log_marginal_likelihood_importance_sampling):
        with pytest.raises(InputError, match=r"bags of the shape \[B, N, \*input_shape\] = \[B, N, 12\], got \(3, 12\)"):
            call(X[:, 0])
    for call in (model.compute_loss, model.log_marginal_likelihood_importance_sampling):
        with pytest.raises(InputError, match=r"mask must have the shape \[B, N\] = \(3, 6\) of the bags, got \(3, 5\)"):
            call(X, MASK[:, 1:])
        with pytest.raises(InputError, match="mask has values other than 0 and 1"):
            call(X, MASK.float() / 2)
        with pytest.raises(InputError, match=r"1 of 3 bags have no instance, their mask is all 0 .the first is bag 1.: leave them out"):
            call(X, MASK & (torch.arange(B) != 1)[:, None])
        with pytest.raises(ValueError, match="n_samples is 0"):
            call(X, MASK, n_samples=0)
    with pytest.raises(ValueError, match="reduction is 'maen' .did you mean 'mean'"):
        model.compute_loss(X, reduction="maen")
