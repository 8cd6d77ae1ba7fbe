"""``dwswap.DepthwiseConv2d``: a drop-in for ``nn.Conv2d``, in values, keys and files."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from dwswap import DepthwiseConv2d, depthwise_conv2d, optimize, report

PADDINGS = [0, 1, (2, 1), "same", "valid"]
MODES = ["zeros", "reflect", "replicate", "circular"]


def pair(**changes) -> tuple[nn.Conv2d, DepthwiseConv2d]:
    """A convolution and ours, with different parameters."""
    given = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, **changes}
    return nn.Conv2d(**given, groups=given["in_channels"]), DepthwiseConv2d(**given)


def image(device: str = "cpu") -> Tensor:
    return torch.randn(2, 4, 9, 11, device=device)


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_keys_are_those_of_conv2d(device, padding, mode, bias):
    theirs, ours = pair(padding=padding, padding_mode=mode, bias=bias, device=device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    x = image(device)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    # And back.
    theirs.load_state_dict(DepthwiseConv2d(4, 8, 3, bias=bias).state_dict())
    assert not torch.equal(theirs.weight, ours.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_size": (3, 5), "stride": (2, 1), "dilation": (1, 2), "padding": 2},
        {"kernel_size": (1, 4), "padding": "same"},
        {"kernel_size": 2, "padding": "same", "dilation": 3},
        {"kernel_size": 7, "padding": 3, "stride": 2, "out_channels": 4},
        {"kernel_size": 5, "padding": 4, "out_channels": 12, "padding_mode": "reflect"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_other_geometry(device, changes):
    theirs, ours = pair(device=device, **changes)
    ours.load_state_dict(theirs.state_dict())
    x = image(device)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_same_seed_gives_the_same_parameters():
    drawn = []
    for cls, groups in ((nn.Conv2d, {"groups": 4}), (DepthwiseConv2d, {})):
        torch.manual_seed(0)
        drawn.append(cls(4, 8, 3, **groups).state_dict())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in ("weight", "bias"))


def test_constructor_arguments():
    module = DepthwiseConv2d(
        4, 8, (3, 5), (2, 1), (1, 2), (1, 2), 4, False, "circular", "meta", torch.float64
    )
    assert isinstance(module, nn.Conv2d)
    assert module.groups == 4
    assert module.bias is None
    assert module.weight.is_meta
    assert module.weight.dtype == torch.float64
    assert (module.stride, module.padding, module.dilation) == ((2, 1), (1, 2), (1, 2))
    assert repr(module).startswith("DepthwiseConv2d(4, 8, kernel_size=(3, 5), stride=(2, 1)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 2}, r"groups must equal in_channels \(4\), got 2"),
        ({"groups": 1}, r"groups must equal in_channels \(4\), got 1"),
        ({"out_channels": 6}, r"out_channels must be divisible by groups"),
        ({"padding": "same", "stride": 2}, r"padding='same' is not supported for strided"),
        ({"padding_mode": "foo"}, r"padding_mode must be one of"),
    ],
    ids=str,
)
def test_refused_arguments(arguments, message):
    given = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, **arguments}
    with pytest.raises(ValueError, match=message):
        DepthwiseConv2d(**given)


def test_refused_input():
    module = DepthwiseConv2d(4, 4, 3)
    # Three times the channels would be a convolution with another multiplier.
    for channels in (2, 1, 12):
        with pytest.raises(ValueError, match="groups = 4 channels, got shape"):
            module(torch.randn(1, channels, 8, 8))


# --- from_conv2d and to_conv2d ------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_conversions_share_the_parameters(training, mode):
    conv, _ = pair(padding=1, padding_mode=mode)
    conv.train(training)
    conv.weight.requires_grad_(False)
    ours = DepthwiseConv2d.from_conv2d(conv)
    back = ours.to_conv2d()
    assert type(ours) is DepthwiseConv2d
    assert type(back) is nn.Conv2d
    for module in (ours, back):
        assert module.weight is conv.weight
        assert module.bias is conv.bias
        assert module.training is training
    x = image()
    torch.testing.assert_close(ours(x), conv(x))
    assert torch.equal(back(x), conv(x))
    ours(x).sum().backward()
    assert conv.bias.grad is not None
    assert conv.weight.grad is None


def test_conversions_do_not_share_containers():
    """A hook or a parameter that is added to the one must not appear in the other."""
    conv, _ = pair()
    ours = DepthwiseConv2d.from_conv2d(conv)
    calls = []
    ours.register_forward_hook(lambda *_: calls.append("ours"))
    ours.register_buffer("extra", torch.zeros(1))
    ours.bias = None
    conv(image())
    assert calls == []
    assert list(conv.state_dict()) == ["weight", "bias"]
    assert conv.bias is not None


def test_conversion_keeps_hooks_and_attributes():
    conv, _ = pair()
    calls = []
    conv.register_forward_hook(lambda *_: calls.append("hook"))
    conv.note = "kept"
    ours = DepthwiseConv2d.from_conv2d(conv)
    ours(image())
    assert calls == ["hook"]
    assert ours.note == "kept"


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 1, groups=4)],
    ids=str,
)
def test_what_is_not_depthwise_is_refused(conv):
    with pytest.raises(ValueError, match=r"conv must have groups == in_channels, got groups="):
        DepthwiseConv2d.from_conv2d(conv)


def test_one_channel_is_depthwise():
    conv = nn.Conv2d(1, 3, 3)
    x = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(DepthwiseConv2d.from_conv2d(conv)(x), conv(x))


# --- copies and files ---------------------------------------------------------------------------


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("converted", [False, True])
def test_copies(through, converted):
    conv, ours = pair(padding=(1, 2), stride=2)
    if converted:
        ours = DepthwiseConv2d.from_conv2d(conv)
    ours.eval()
    twin = through(ours)
    assert type(twin) is DepthwiseConv2d
    assert twin.training is False
    assert twin.weight is not ours.weight
    assert isinstance(twin.weight, nn.Parameter)
    x = image()
    assert torch.equal(twin(x), ours(x))
    with torch.no_grad():
        twin.weight.zero_()
    assert not torch.equal(twin(x), ours(x))


def test_checkpoints_cross_over():
    """In files, with weights_only, in both directions."""
    theirs, ours = pair()
    for source, target in ((theirs, ours), (ours, theirs)):
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        assert str(target.load_state_dict(torch.load(buffer))) == "<All keys matched successfully>"
        nn.init.normal_(target.weight)


def test_conversion_holds_no_reference_to_the_original():
    conv, _ = pair()
    ours = DepthwiseConv2d.from_conv2d(conv)
    reference = weakref.ref(conv)
    del conv
    assert reference() is None
    assert ours(image()).shape == (2, 8, 7, 9)


def test_moves_and_casts():
    theirs, ours = pair(padding=1)
    ours.load_state_dict(theirs.state_dict())
    x = image()
    for change in (
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to(memory_format=torch.channels_last),
    ):
        theirs, ours = change(theirs), change(ours)
        given = x.to(ours.weight.dtype)
        result = ours(given)
        assert result.stride() == theirs(given).stride()
        torch.testing.assert_close(result, theirs(given))


def test_training_steps_agree():
    torch.manual_seed(0)
    theirs, ours = pair(padding=1)
    ours.load_state_dict(theirs.state_dict())
    for module in (theirs, ours):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for seed in range(3):
            x = torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_from_conv2d_refuses_what_is_no_convolution():
    with pytest.raises(TypeError, match=r"conv must be an nn\.Conv2d, got int"):
        DepthwiseConv2d.from_conv2d(3)


@pytest.mark.parametrize("train", [False, True])
def test_geometry_of_numpy(train):
    number = pytest.importorskip("numpy").int64
    options = {name: number(1) for name in ("stride", "padding", "dilation")}
    conv = nn.Conv2d(4, 4, 3, **options, groups=number(4))
    dense = nn.Conv2d(4, 2, 1, number(2), groups=number(1))
    model = nn.Sequential(conv, nn.BatchNorm2d(4), dense, nn.BatchNorm2d(2)).train(train)
    x = torch.randn(2, 4, 5, 5)
    result = optimize(model)
    (layer,) = report(result).swapped
    assert type(layer.groups) is int
    torch.testing.assert_close(result(x), model(x))
    assert type(DepthwiseConv2d.from_conv2d(conv).groups) is int
    torch.testing.assert_close(depthwise_conv2d(x, conv.weight, conv.bias, **options), conv(x))
