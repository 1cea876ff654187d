"""Backbones: shapes that come back exactly, options, refused settings."""

from typing import get_args

import pytest
import torch
from torch import nn

from aecore.errors import ConfigError
from aecore.nn import Backbone
from aecore.nn._backbone import num_groups
from aecore.nn.attention import AttentionSpec, Block, Patches, Pixels, smallest_side
from aecore.nn.conv import ConvSpec
from aecore.nn.hybrid import HybridSpec
from aecore.nn.mlp import MLPSpec
from aecore.nn.recurrent import RecurrentSpec
from aecore.nn.resnet import ResidualBlock, ResNetSpec
from aecore.registry import BACKBONES, field_types, from_dict, to_dict

SHAPES = [(17,), (2, 9), (1, 1, 1), (1, 28, 28), (3, 32, 32), (3, 5, 8), (1, 105, 105), (2, 3, 4, 5), (3, 5, 9, 7)]
SMALL = [
    MLPSpec(hidden=(16, 8)),
    ConvSpec(channels=(8, 16, 8)),
    ResNetSpec(channels=(8, 16, 8)),
    RecurrentSpec(width=8, layers=2),
    AttentionSpec(width=8, heads=2, depth=1),
    AttentionSpec(width=8, heads=2, depth=1, patch=3),
]
LAYERS = {
    "group": {"GroupNorm"},
    "batch": {"BatchNorm1d", "BatchNorm2d"},
    "layer": {"LayerNorm"},
    "relu": {"ReLU"},
    "leaky_relu": {"LeakyReLU"},
    "silu": {"SiLU"},
    "tanh": {"Tanh"},
}


def choices(kind: str) -> list[tuple[str, str, str]]:
    """Every kind with every norm and activation that its spec knows."""
    types = field_types(BACKBONES.spec_type(kind))
    return [(kind, norm, act) for norm in get_args(types["norm"]) for act in get_args(types["activation"])]


def run(spec: object, shape: tuple[int, ...], latent_dim: int = 4) -> Backbone:
    backbone: Backbone = BACKBONES.build(spec, shape, latent_dim)
    assert backbone.encoder(torch.randn(2, *shape)).shape == (2, backbone.num_features)
    assert backbone.decoder(torch.randn(3, latent_dim)).shape == (3, *shape)
    if backbone.map_shape is not None:
        assert backbone.encoder(torch.randn(2, *shape)).unflatten(1, backbone.map_shape).shape == (2, *backbone.map_shape)
        assert backbone.map_decoder(torch.randn(3, *backbone.map_shape)).shape == (3, *shape)
    return backbone


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.kind)
def test_any_shape_comes_back_as_it_went_in(spec: object, shape: tuple[int, ...]) -> None:
    run(spec, shape)


@pytest.mark.parametrize(("kind", "norm", "activation"), [choice for kind in BACKBONES.kinds() for choice in choices(kind)])
def test_every_combination_of_norm_and_activation_builds_what_it_says(kind: str, norm: str, activation: str) -> None:
    spec = BACKBONES.from_dict({"kind": kind, "norm": norm, "activation": activation, "dropout": 0.25, "output": "sigmoid"})
    assert from_dict(type(spec), to_dict(spec)) == spec
    backbone = run(spec, (3, 8, 8))
    names = {type(layer).__name__ for layer in (*backbone.encoder.modules(), *backbone.decoder.modules())}
    norms = {name for name in names if "Norm" in name}
    assert (norms and norms <= LAYERS[norm]) if norm != "none" else not norms
    assert LAYERS[activation] <= names
    assert {"Dropout", "Sigmoid"} <= names
    assert backbone.bounded


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("shape", [(7,), (3, 9, 6), (2, 3, 5, 4)], ids=str)
def test_an_encoder_sees_and_a_decoder_moves_every_value(spec: object, shape: tuple[int, ...]) -> None:
    backbone = run(spec, shape)
    x = torch.randn(1, *shape, requires_grad=True)
    backbone.encoder(x).square().sum().backward()
    assert x.grad.abs().min() > 0
    one, other = (backbone.decoder(z) for z in torch.randn(2, 1, 4))
    assert (one - other).abs().min() > 0


def test_a_residual_block_adds_to_what_came_in() -> None:
    block = next(layer for layer in run(ResNetSpec(), (1, 28, 28)).encoder if isinstance(layer, ResidualBlock))
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 32, 14, 14)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("shape", [(10,), (2, 7), (3, 5, 8), (1, 4, 3, 5)], ids=str)
@pytest.mark.parametrize("side", [0, 1, 3, 4])
def test_patches_put_together_again_are_the_sample(shape: tuple[int, ...], side: int) -> None:
    patches, x = Patches(shape, side), torch.randn(2, *shape)
    tokens = patches(x)
    assert tokens.shape == (2, patches.num_tokens, patches.values)
    assert torch.equal(Pixels(patches)(tokens), x)


def test_a_patch_holds_neighbours_of_all_channels() -> None:
    x = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    tokens = Patches((2, 4, 6), 2)(x)
    assert torch.equal(tokens[0, 4], x[0, :, 2:4, 2:4].flatten())


def test_the_side_of_patches_is_chosen_so_that_attention_stays_cheap() -> None:
    sides = {axes: smallest_side(axes) for axes in ((17,), (784,), (8, 8), (28, 28), (32, 32), (105, 105), (256, 256), (16, 64, 64))}
    assert sides == {
        (17,): 1, (784,): 13, (8, 8): 1, (28, 28): 4, (32, 32): 4, (105, 105): 14, (256, 256): 32, (16, 64, 64): 13,
    }  # fmt: skip


def test_attention_looks_at_all_tokens_and_knows_where_they_stand() -> None:
    torch.manual_seed(0)
    encoder = run(AttentionSpec(width=8, heads=2, depth=1), (6,)).encoder
    x = torch.randn(1, 6, requires_grad=True)
    encoder(x)[0, :8].square().sum().backward()  # features of the first token
    assert x.grad.abs().min() > 0
    swapped = encoder(x[:, [1, 0, 2, 3, 4, 5]]).unflatten(1, (6, 8))[:, [1, 0, 2, 3, 4, 5]].flatten(1)
    assert not torch.allclose(encoder(x), swapped)


def test_an_attention_head_is_the_published_formula() -> None:
    torch.manual_seed(0)
    block, tokens = Block(AttentionSpec(width=6, heads=2)), torch.randn(2, 5, 6)
    peer = nn.MultiheadAttention(6, 2, batch_first=True)
    peer.in_proj_weight.data, peer.out_proj.weight.data = block.queries_keys_values.weight.data, block.gathered.weight.data
    peer.in_proj_bias.data.zero_()
    peer.out_proj.bias.data = block.gathered.bias.data
    torch.testing.assert_close(block._attend(tokens), peer(tokens, tokens, tokens, need_weights=False)[0])


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
        ({"kind": "resnet", "channels": []}, "channels is empty"),
        ({"kind": "resnet", "blocks": 0}, "ResNetSpec.blocks is 0"),
        ({"kind": "attention", "width": 30, "heads": 4}, "width is 30, expected a multiple of heads=4"),
        ({"kind": "attention", "norm": "group"}, "known: layer, none"),
        ({"kind": "conv", "norm": "grup"}, "did you mean 'group'"),
        ({"kind": "conv", "dropout": 1.0}, "dropout is 1.0"),
        ({"kind": "cnv"}, "did you mean 'conv'"),
    ],
)
def test_settings_that_cannot_work_are_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BACKBONES.from_dict(spec)


@pytest.mark.parametrize("spec", [ConvSpec(), ResNetSpec()])
@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4, 5)])
def test_convolutions_name_the_shapes_they_take(spec: object, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"1 to 4 axes.*backbone.kind=mlp"):
        BACKBONES.build(spec, shape, 4)


def test_attention_takes_any_number_of_axes_but_none() -> None:
    run(AttentionSpec(), (1, 2, 3, 4, 5))
    with pytest.raises(ConfigError, match=r"at least 1 axis.*backbone.kind=mlp"):
        BACKBONES.build(AttentionSpec(), (), 4)


def test_an_image_is_read_row_by_row_where_time_is_its_second_axis() -> None:
    torch.manual_seed(0)
    spec = RecurrentSpec(width=8, time_axis=1, bidirectional=False)
    encoder = run(spec, (2, 5, 3)).encoder
    x = torch.randn(1, 2, 5, 3)
    rows = RecurrentSpec(width=8, bidirectional=False)
    other = BACKBONES.build(rows, (5, 6), 4).encoder
    other.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder(x), other(x.permute(0, 2, 1, 3).flatten(2)))


@pytest.mark.parametrize("shape", [(3, 2, 9, 7), (4, 5, 6), (1, 1, 28, 28)], ids=str)
def test_videos_come_back_as_they_went_in(shape: tuple[int, ...]) -> None:
    run(HybridSpec(channels=(4, 8), width=8), shape)


def test_frames_go_through_the_same_convolutions_one_by_one() -> None:
    encoder = run(HybridSpec(channels=(4, 8), width=8), (3, 2, 9, 7)).encoder
    frames = torch.randn(2, 3, 2, 9, 7)
    each = torch.stack([encoder.step(frames[:, step]) for step in range(3)], 1)
    torch.testing.assert_close(encoder.step(frames.flatten(0, 1)).unflatten(0, (2, 3)), each)
