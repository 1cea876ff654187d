"""Backbones: shapes that come back exactly, options, refused settings."""

import pytest
import torch
from torch import nn

from aecore.errors import ConfigError
from aecore.nn import Backbone
from aecore.nn._backbone import num_groups
from aecore.nn.conv import ConvSpec
from aecore.nn.mlp import MLPSpec
from aecore.registry import BACKBONES, from_dict, to_dict

SHAPES = [(17,), (2, 9), (1, 1, 1), (1, 28, 28), (3, 32, 32), (3, 5, 8), (1, 105, 105), (2, 3, 4, 5)]


def run(spec: object, shape: tuple[int, ...], latent_dim: int = 4) -> Backbone:
    backbone: Backbone = BACKBONES.build(spec, shape, latent_dim)
    assert backbone.encoder(torch.randn(2, *shape)).shape == (2, backbone.num_features)
    assert backbone.decoder(torch.randn(3, latent_dim)).shape == (3, *shape)
    if backbone.map_shape is not None:
        assert backbone.encoder(torch.randn(2, *shape)).unflatten(1, backbone.map_shape).shape == (2, *backbone.map_shape)
        assert backbone.map_decoder(torch.randn(3, *backbone.map_shape)).shape == (3, *shape)
    return backbone


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", [MLPSpec(hidden=(16, 8)), ConvSpec(channels=(8, 16, 8))], ids=["mlp", "conv"])
def test_any_shape_comes_back_as_it_went_in(spec: object, shape: tuple[int, ...]) -> None:
    run(spec, shape)


@pytest.mark.parametrize("kind", BACKBONES.kinds())
@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "tanh"])
def test_every_combination_of_norm_and_activation_builds_what_it_says(kind: str, norm: str, activation: str) -> None:
    spec = BACKBONES.from_dict({"kind": kind, "norm": norm, "activation": activation, "dropout": 0.25, "output": "sigmoid"})
    assert from_dict(type(spec), to_dict(spec)) == spec
    backbone = run(spec, (3, 8, 8))
    names = {type(layer).__name__ for layer in (*backbone.encoder.modules(), *backbone.decoder.modules())}
    expected_norm = {"group": {"GroupNorm"}, "batch": {"BatchNorm1d" if kind == "mlp" else "BatchNorm2d"}, "none": set()}[norm]
    assert {name for name in names if name.endswith(("Norm", "Norm1d", "Norm2d"))} == expected_norm
    assert {"relu": "ReLU", "leaky_relu": "LeakyReLU", "silu": "SiLU", "tanh": "Tanh"}[activation] in names
    assert {"Dropout", "Sigmoid"} <= names
    assert backbone.bounded


def test_conv_normalises_by_groups_unless_told() -> None:
    assert (ConvSpec().norm, MLPSpec().norm) == ("group", "none")
    layers = run(ConvSpec(), (1, 28, 28)).encoder
    assert [layer.num_groups for layer in layers if isinstance(layer, nn.GroupNorm)] == [8, 8]


def test_groups_divide_the_channels_and_never_hold_one_channel_of_many() -> None:
    assert {channels: num_groups(channels) for channels in (1, 3, 4, 6, 7, 8, 12, 32, 48, 64)} == {
        1: 1, 3: 1, 4: 1, 6: 1, 7: 1, 8: 2, 12: 3, 32: 8, 48: 8, 64: 8,
    }  # fmt: skip


def test_group_norm_keeps_information_on_a_one_pixel_map() -> None:
    encoder = run(ConvSpec(channels=(8, 8, 8)), (1, 6, 6)).encoder
    assert not torch.allclose(encoder(torch.randn(1, 1, 6, 6)), encoder(torch.randn(1, 1, 6, 6)))


def test_the_decoder_from_its_map_on_is_the_decoder_without_its_first_layer() -> None:
    backbone = run(ConvSpec(channels=(4, 6)), (1, 9, 7), latent_dim=5)
    assert backbone.map_shape == (6, 3, 2)
    z = torch.randn(2, 5)
    assert torch.equal(backbone.map_decoder(backbone.decoder[0](z).unflatten(1, (6, 3, 2))), backbone.decoder(z))
    assert run(MLPSpec(), (1, 9, 7)).map_shape is None


def test_mlp_decoder_mirrors_the_hidden_sizes() -> None:
    backbone = run(MLPSpec(hidden=(32, 16)), (1, 4, 4), latent_dim=5)
    widths = [[layer.out_features for layer in net if isinstance(layer, nn.Linear)] for net in (backbone.encoder, backbone.decoder)]
    assert widths == [[32, 16], [16, 32, 16]]
    assert not backbone.bounded


def test_mlp_without_hidden_layers_is_linear() -> None:
    backbone = run(MLPSpec(hidden=()), (2, 3))
    assert backbone.num_features == 6
    assert not list(backbone.encoder.parameters())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "mlp", "hidden": [64, 0]}, "MLPSpec.hidden is 0, expected >= 1"),
        ({"kind": "conv", "channels": []}, "channels is empty"),
        ({"kind": "conv", "norm": "grup"}, "did you mean 'group'"),
        ({"kind": "conv", "dropout": 1.0}, "dropout is 1.0"),
        ({"kind": "cnv"}, "did you mean 'conv'"),
    ],
)
def test_settings_that_cannot_work_are_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BACKBONES.from_dict(spec)


@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4, 5)])
def test_conv_names_the_shapes_it_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"1 to 4 axes.*backbone.kind=mlp"):
        BACKBONES.build(ConvSpec(), shape, 4)
