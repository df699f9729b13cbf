"""Sizes of networks, beside sums worked out by hand."""

import pytest
import torch
from torch import nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.models import sizes, students
from diffkd.runs.reports import model_card
from tests.models.unets import network

COSINE = Schedule.cosine(64)


def conv(into, out, side, kernel=3):
    return into * out * kernel * kernel * side * side


def unet_macs(channels, layers, size, *, attention, mid=True, images=1):
    """MACs of one pass: convolutions, linear layers, and attention's two products."""
    time, last = 4 * channels[0], len(channels) - 1
    total = channels[0] * time + time * time + conv(images, channels[0], size)

    def resnet(into, out, side):
        shortcut = into * out * side * side if into != out else 0
        return conv(into, out, side) + time * out + conv(out, out, side) + shortcut

    def attend(width, side):
        pixels = side * side
        return 4 * pixels * width * width + 2 * pixels * pixels * width

    now, skips = channels[0], [channels[0]]
    for level, width in enumerate(channels):
        side = size >> level
        for _ in range(layers):
            total += resnet(now, width, side) + attention[level] * attend(width, side)
            now = width
            skips.append(now)
        if level < last:
            total += conv(now, now, side // 2)
            skips.append(now)
    inner = size >> last
    if mid:
        total += 2 * resnet(now, now, inner) + attend(now, inner)
    for level in range(last, -1, -1):
        side, width = size >> level, channels[level]
        for _ in range(layers + 1):
            total += resnet(now + skips.pop(), width, side) + attention[level] * attend(width, side)
            now = width
        if level:
            total += conv(now, now, 2 * side)
    return total + conv(now, images, size)


UNETS = [
    ((8, 16), 1, [False, False], {"mid_block_type": None}),
    ((8, 16), 1, [False, False], {}),
    ((8, 8, 16), 2, [False, True, True], {}),
    ((8, 16), 1, [True, False], {"attention_head_dim": None, "num_class_embeds": 4}),
]


@pytest.mark.parametrize(("channels", "layers", "attention", "config"), UNETS)
def test_macs_of_a_unet(channels, layers, attention, config):
    net = network(channels, attention, layers_per_block=layers, **config)
    classes = {"num_classes": 3, "null_label": 3} if "num_class_embeds" in config else {}
    found = sizes.denoiser_size(Denoiser(net, COSINE, "v_prediction", **classes))
    mid = "mid_block_type" not in config
    assert found.macs == unet_macs(channels, layers, 8, attention=attention, mid=mid)
    assert (
        found.parameters == sum(p.numel() for p in net.parameters()) and found.bytes == 4 * found.parameters
    )


def test_size_of_a_small_stack():
    """A strided, a grouped and a transposed convolution, a linear layer; norms have no products."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(256, 10),
    ).eval()  # fmt: skip
    found = sizes.network_size(net, torch.zeros(1, 3, 8, 8))
    assert found.macs == 3 * 8 * 9 * 16 + 8 * 2 * 9 * 16 + 8 * 4 * 4 * 16 + 256 * 10
    weights = (3 * 8 * 9 + 8) + 16 + (8 * 2 * 9 + 8) + (8 * 4 * 4 + 4) + 8 + (256 * 10 + 10)
    assert found.parameters == weights
    assert found.bytes == 4 * weights + 4 * (4 + 4) + 8  # the running mean and variance, and an int64 count
    net.half()
    assert sizes.network_size(net.float(), torch.zeros(1, 3, 8, 8)) == found


@pytest.mark.parametrize(("dtype", "each"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float64, 8)])
def test_bytes_depend_on_the_dtype(dtype, each):
    net = network()
    whole = sizes.denoiser_size(Denoiser(net, COSINE, "v_prediction"))
    found = sizes.denoiser_size(Denoiser(net.to(dtype), COSINE, "v_prediction"))
    assert found == whole._replace(bytes=each * whole.parameters)


def test_one_evaluation_is_counted_and_nothing_changes():
    net = network((8, 16), num_class_embeds=4, dropout=0.5).train()
    denoiser = Denoiser(net, COSINE, "v_prediction", num_classes=3, null_label=3)
    calls = []
    hook = net.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    found = sizes.denoiser_size(denoiser)
    hook.remove()
    assert calls == [1] and net.training and all(p.grad is None for p in net.parameters())
    assert found.macs == unet_macs((8, 16), 1, 8, attention=[False, False])
    assert found.recorded() == found._asdict()
    assert {**model_card.describe(denoiser), **found._asdict()} == model_card.describe(denoiser)


def test_smaller_students_cost_less():
    """By formula: with half of the channels, and without the middle."""
    teacher = Denoiser(network((16, 32), [False, True]), COSINE, "v_prediction")
    narrow, without = students.narrow(teacher, [8, 16]), students.drop_blocks(teacher, ["mid_block"])
    whole = sizes.denoiser_size(teacher)
    assert sizes.denoiser_size(narrow).macs == unet_macs((8, 16), 1, 8, attention=[False, True])
    assert sizes.denoiser_size(without).macs == unet_macs((16, 32), 1, 8, attention=[False, True], mid=False)
    assert whole.macs > sizes.denoiser_size(without).macs > sizes.denoiser_size(narrow).macs


@pytest.mark.filterwarnings("ignore")
def test_compiling_in_place_does_not_change_the_size():
    torch._dynamo.reset()
    net = network(mid_block_type=None)
    denoiser = Denoiser(net, COSINE, "v_prediction")
    before = sizes.denoiser_size(denoiser)
    net.compile(backend="eager")
    assert sizes.denoiser_size(denoiser) == before and before.macs > 0
    x_t, t, _ = denoiser.example_inputs()
    denoiser(x_t, t)  # and after it has run
    assert sizes.denoiser_size(denoiser) == before
    torch._dynamo.reset()


def test_in_words():
    assert str(sizes.Size(1_234_567, 89_000_000, 4)) == "1.23 M parameters, 89 M MACs"
    assert str(sizes.Size(2_000, 500, 4)) == "0.002 M parameters, 0.0005 M MACs"
