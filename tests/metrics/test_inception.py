"""The Inception of FID beside a second one in NumPy; its inputs, modes and files of weights."""

from __future__ import annotations

import hashlib
import os
import shutil
import types
import urllib.error
from collections.abc import Callable, Iterator
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.torch import save_file
from torch import Tensor, nn

from diffkd.core.precision import full_float32
from diffkd.errors import UserError
from diffkd.metrics.features import inception, inception_weights
from diffkd.metrics.features.inception import InceptionV3, random_weights
from diffkd.metrics.features.inception_weights import NAMES, URL, VARIABLE, find_weights, read_weights
from diffkd.metrics.features.resize import RESIZES, resize

# The published layout: name, outputs and kernel (rows x columns) of every convolution.
STEM = "2d_1a_3x3 32 3x3, 2d_2a_3x3 32 3x3, 2d_2b_3x3 64 3x3, 2d_3b_1x1 80 1x1, 2d_4a_3x3 192 3x3"
A = "1x1 64 1x1, 5x5_1 48 1x1, 5x5_2 64 5x5, 3x3dbl_1 64 1x1, 3x3dbl_2 96 3x3, 3x3dbl_3 96 3x3, _pool {} 1x1"
B = "3x3 384 3x3, 3x3dbl_1 64 1x1, 3x3dbl_2 96 3x3, 3x3dbl_3 96 3x3"
C = (
    "1x1 192 1x1, 7x7_1 {0} 1x1, 7x7_2 {0} 1x7, 7x7_3 192 7x1, 7x7dbl_1 {0} 1x1, 7x7dbl_2 {0} 7x1, "
    "7x7dbl_3 {0} 1x7, 7x7dbl_4 {0} 7x1, 7x7dbl_5 192 1x7, _pool 192 1x1"
)
D = "3x3_1 192 1x1, 3x3_2 320 3x3, 7x7x3_1 192 1x1, 7x7x3_2 192 1x7, 7x7x3_3 192 7x1, 7x7x3_4 192 3x3"
E = (
    "1x1 320 1x1, 3x3_1 384 1x1, 3x3_2a 384 1x3, 3x3_2b 384 3x1, 3x3dbl_1 448 1x1, 3x3dbl_2 384 3x3, "
    "3x3dbl_3a 384 1x3, 3x3dbl_3b 384 3x1, _pool 192 1x1"
)
LAYOUT = {
    "5b": A.format(32), "5c": A.format(64), "5d": A.format(64), "6a": B, "6b": C.format(128),
    "6c": C.format(160), "6d": C.format(160), "6e": C.format(192), "7a": D, "7b": E, "7c": E,
}  # fmt: skip
INPUTS = {
    "5b": 192, "5c": 256, "5d": 288, "6a": 288, "6b": 768, "6c": 768, "6d": 768, "6e": 768, "7a": 768,
    "7b": 1280, "7c": 2048,
}  # fmt: skip


# A second implementation: NumPy, float64, windows instead of convolutions, norms unfolded.


class Second:
    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: value.double().numpy() for name, value in state.items()}

    def unit(self, name: str, x: np.ndarray, stride: int = 1, pad: tuple[int, int] = (0, 0)) -> np.ndarray:
        weight = self.state[f"{name}.conv.weight"]
        x = np.pad(x, [(0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])])
        windows = sliding_window_view(x, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
        y = np.tensordot(weight, windows, ([1, 2, 3], [1, 4, 5])).swapaxes(0, 1)
        gamma, beta, mean, var = (
            self.state[f"{name}.bn.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return np.maximum((y - mean) / np.sqrt(var + 0.001) * gamma + beta, 0)

    def block(self, name: str, x: np.ndarray, pool: Callable[[np.ndarray], np.ndarray] | None = None):
        """Of the kind its name says. pool: another in the place of the right one, to see that it matters."""

        def conv(branch: str, x: np.ndarray, **options) -> np.ndarray:
            return self.unit(f"Mixed_{name}.branch{branch}", x, **options)

        square, row, column = {"pad": (1, 1)}, {"pad": (0, 3)}, {"pad": (3, 0)}
        if name in ("5b", "5c", "5d"):
            double = conv("3x3dbl_3", conv("3x3dbl_2", conv("3x3dbl_1", x), **square), **square)
            five = conv("5x5_2", conv("5x5_1", x), pad=(2, 2))
            out = [conv("1x1", x), five, double, conv("_pool", (pool or means)(x))]
        elif name == "6a":
            double = conv("3x3dbl_3", conv("3x3dbl_2", conv("3x3dbl_1", x), **square), stride=2)
            out = [conv("3x3", x, stride=2), double, maxima(x, 2, 0)]
        elif name in ("6b", "6c", "6d", "6e"):
            seven = conv("7x7_3", conv("7x7_2", conv("7x7_1", x), **row), **column)
            double = conv("7x7dbl_3", conv("7x7dbl_2", conv("7x7dbl_1", x), **column), **row)
            double = conv("7x7dbl_5", conv("7x7dbl_4", double, **column), **row)
            out = [conv("1x1", x), seven, double, conv("_pool", (pool or means)(x))]
        elif name == "7a":
            seven = conv("7x7x3_3", conv("7x7x3_2", conv("7x7x3_1", x), **row), **column)
            out = [
                conv("3x3_2", conv("3x3_1", x), stride=2),
                conv("7x7x3_4", seven, stride=2),
                maxima(x, 2, 0),
            ]
        else:
            three, double = conv("3x3_1", x), conv("3x3dbl_2", conv("3x3dbl_1", x), **square)
            pool = pool or (means if name == "7b" else maxima)
            out = [
                conv("1x1", x),
                conv("3x3_2a", three, pad=(0, 1)),
                conv("3x3_2b", three, pad=(1, 0)),
                conv("3x3dbl_3a", double, pad=(0, 1)),
                conv("3x3dbl_3b", double, pad=(1, 0)),
                conv("_pool", pool(x)),
            ]
        return np.concatenate(out, 1)

    def trunk(self, x: np.ndarray) -> np.ndarray:
        x = self.unit("Conv2d_1a_3x3", x, stride=2)
        x = self.unit("Conv2d_2b_3x3", self.unit("Conv2d_2a_3x3", x), pad=(1, 1))
        x = self.unit("Conv2d_4a_3x3", self.unit("Conv2d_3b_1x1", maxima(x, 2, 0)))
        x = maxima(x, 2, 0)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.block(name, x)
        return x.reshape(*x.shape[:2], -1).mean(2)


def threes(x: np.ndarray, stride: int, pad: int, border: float) -> np.ndarray:
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)], constant_values=border)
    return sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]


def maxima(x: np.ndarray, stride: int = 1, pad: int = 1) -> np.ndarray:
    return threes(x, stride, pad, -np.inf).max((4, 5))


def means(x: np.ndarray) -> np.ndarray:
    return np.nanmean(threes(x, 1, 1, np.nan), (4, 5))  # of the pixels that are there


def means_of_padding_too(x: np.ndarray) -> np.ndarray:
    return threes(x, 1, 1, 0).mean((4, 5))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights, norms and biases: nothing is at an identity that could hide a mistake."""
    generator = torch.Generator().manual_seed(5)
    weights = random_weights(3)
    for name, value in weights.items():
        if value.ndim == 1:
            spread = torch.rand(value.shape, generator=generator)
            weights[name] = spread + 0.5 if name.endswith(("bn.weight", "var")) else (spread - 0.5) / 2
    return weights


@pytest.fixture(scope="module")
def net(state) -> InceptionV3:
    return InceptionV3(state)


@pytest.fixture(scope="module")
def net64(state) -> InceptionV3:
    return InceptionV3(state, dtype=torch.float64)


def pictures(count: int, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def test_names_shapes_and_parameters(net):
    expected = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    counters = set()
    listed = {"Conv": STEM} | {f"Mixed_{name}.branch": text for name, text in LAYOUT.items()}
    for prefix, text in listed.items():
        for entry in text.split(", "):
            name, width, kernel = entry.split()
            expected[f"{prefix}{name}.conv.weight"] = (int(width), *map(int, kernel.split("x")))
            for part in ("weight", "bias", "running_mean", "running_var"):
                expected[f"{prefix}{name}.bn.{part}"] = (int(width),)
            counters.add(f"{prefix}{name}.bn.num_batches_tracked")
    given = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    inputs = {name: shape[1] for name, shape in given.items() if len(shape) == 4}
    given = {name: (shape[0], *shape[2:]) if len(shape) == 4 else shape for name, shape in given.items()}
    assert len(given) == 566 and len(expected) == 472
    assert {name: shape for name, shape in given.items() if name not in counters} == expected
    assert given.keys() - expected.keys() == counters
    assert all(
        inputs[f"Mixed_{name}.branch{LAYOUT[name].split()[0]}.conv.weight"] == INPUTS[name] for name in INPUTS
    )
    assert sum(value.numel() for value in net.parameters()) == 23_850_960
    assert net.num_features == 2048


@pytest.mark.parametrize("name", LAYOUT)
def test_blocks_beside_the_second(state, net64, name):
    x = np.random.default_rng(0).normal(size=(2, INPUTS[name], 5, 6))
    ours = getattr(net64, f"Mixed_{name}")(torch.from_numpy(x)).numpy()
    theirs = Second(state).block(name, x)
    assert ours.shape == theirs.shape and theirs.std() > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("5b", means_of_padding_too),
        ("5c", means_of_padding_too),
        ("6c", means_of_padding_too),
        ("7b", means_of_padding_too),
        ("7b", maxima),
        ("7c", means),
    ],
)
def test_the_second_tells_the_pools_apart(state, net64, name, pool):
    x = np.random.default_rng(0).normal(size=(1, INPUTS[name], 5, 6))
    ours = getattr(net64, f"Mixed_{name}")(torch.from_numpy(x)).numpy()
    assert np.abs(ours - Second(state).block(name, x, pool)).max() > 1e-2


def test_the_whole_beside_the_second(state, net64):
    """At a smaller size, where all blocks still have borders and strides."""
    x = np.random.default_rng(1).uniform(-1, 1, (2, 3, 139, 171))
    ours = net64.trunk(torch.from_numpy(x)).numpy()
    theirs = Second(state).trunk(x)
    assert ours.shape == (2, 2048) and np.abs(theirs[0] - theirs[1]).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_single_beside_double_precision(net, net64):
    images = pictures(1)
    single, double = net(images), net64(images)
    assert single.dtype == torch.float32 and double.dtype == torch.float64 and single.shape == (1, 2048)
    assert 0 < (single - double).abs().max() < 1e-5 * double.abs().max()


def test_features_do_not_depend_on_the_batch(net):
    images = pictures(5)
    whole = net(images)
    apart = torch.cat([net(images[:1]), net(images[1:3]), net(images[3:])])
    assert (whole - apart).abs().max() < 1e-5 * whole.abs().max()
    assert (whole[0] - whole[1]).abs().max() > 1e-3 * whole.abs().max()


def test_an_empty_batch(net):
    assert net(pictures(0)).shape == (0, 2048)


def test_untrained_activations_are_of_order_one():
    features = InceptionV3.untrained(seed=1)(pictures(1))
    assert 0.01 < features.mean() < 10 and 0.01 < features.std() < 10
    assert not torch.equal(random_weights(1)["fc.weight"], random_weights(2)["fc.weight"])


# What goes in and what comes out.


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_resized_then_scaled(state, monkeypatch, how, channels):
    network = InceptionV3(state, resize=how)
    monkeypatch.setattr(network, "trunk", lambda x: x)
    images = pictures(2, channels)
    given = network(images)
    assert given.dtype == torch.float32
    scaled = resize(images, 299, how)
    scaled = scaled / 127.5 - 1 if how == "pytorch-fid" else (scaled - 128) / 128
    assert torch.equal(given, scaled.expand(2, 3, 299, 299))
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    ends = torch.tensor([-1.0, 1.0 if how == "pytorch-fid" else 0.9921875])
    assert torch.allclose(network(black_and_white)[:, 0, 0, 0], ends)


def test_grey_is_repeated(net):
    grey = pictures(2, channels=1)
    assert torch.allclose(net(grey), net(grey.expand(-1, 3, -1, -1)), rtol=0, atol=1e-6)


def test_the_layout_of_the_images_does_not_matter(net):
    images = pictures(2)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(net(images), net(last), rtol=0, atol=1e-6)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), pictures(1, channels=4), pictures(1)[0]])
def test_other_images_are_refused(net, images):
    shape = ", ".join(map(str, images.shape))
    message = fault(lambda: net(images))
    assert f"images of {images.dtype} ({shape})" in message and "give uint8 (B, 1 or 3, H, W)" in message


def test_logits_and_probabilities(state, net):
    features = net(pictures(2))
    x, weight = features.double().numpy(), state["fc.weight"].double().numpy()
    product = np.einsum("bf,cf->bc", x, weight)
    logits = net.logits(features)
    np.testing.assert_allclose(logits, product + state["fc.bias"].double().numpy(), rtol=1e-9, atol=1e-9)
    probabilities = net.probabilities(features)
    exponentials = np.exp(product - product.max(1, keepdims=True))
    expected = exponentials / exponentials.sum(1, keepdims=True)
    assert logits.shape == probabilities.shape == (2, 1008)
    assert probabilities.dtype == torch.float64
    np.testing.assert_allclose(probabilities, expected, rtol=1e-9)
    assert (logits.softmax(1) - probabilities).abs().max() > 1e-6  # the bias would have been seen


# Modes.


def test_locked_in_eval_mode(state):
    network, images = InceptionV3(state), pictures(2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    features = network(images)
    assert network.train() is network
    nn.Sequential(network).train(True)
    assert not any(module.training for module in network.modules())
    assert torch.equal(network(images), features)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_no_gradients(net):
    assert not any(value.requires_grad for value in net.parameters())
    with torch.enable_grad():
        features = net.trunk(torch.zeros(1, 3, 96, 96, requires_grad=True))
        assert not net.logits(features.requires_grad_()).requires_grad
        assert not net.probabilities(features).requires_grad
    with torch.inference_mode():
        assert net(pictures(1)).shape == (1, 2048)


def test_autocast_is_kept_out(net):
    images = pictures(1)
    features = net(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = net(images)
        assert torch.equal(net.logits(features), net.logits(inside))
    assert inside.dtype == torch.float32 and torch.equal(inside, features)


def test_building_leaves_the_global_generator_alone(state):
    before = torch.get_rng_state()
    InceptionV3(state)
    random_weights(0)
    assert torch.equal(torch.get_rng_state(), before)


def tf32() -> object:
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision if hasattr(cudnn, "conv") else cudnn.allow_tf32


@pytest.mark.parametrize("fails", [False, True])
def test_tf32_is_off_in_the_trunk_only(state, fails):
    network, seen = InceptionV3(state), []

    def look(*_: object) -> None:
        cudnn = torch.backends.cudnn
        seen.append((tf32(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic))
        if fails:
            raise KeyboardInterrupt

    network.get_submodule("Mixed_5b").register_forward_pre_hook(look)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=True):
        before = tf32()
        try:
            network.trunk(torch.zeros(1, 3, 96, 96))
        except KeyboardInterrupt:
            assert fails
        assert seen == [("ieee" if isinstance(before, str) else False, True, True, True)]
        assert tf32() == before
        assert before in ("tf32", True)


def test_tf32_is_off_with_an_older_torch(monkeypatch):
    cudnn = types.SimpleNamespace(allow_tf32=True, benchmark=True)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    with full_float32("cpu"):
        assert (cudnn.allow_tf32, cudnn.benchmark) == (False, True)
    assert (cudnn.allow_tf32, cudnn.benchmark) == (True, True)


@pytest.mark.gpu
def test_the_gpu_has_the_cpus_features(state, net):
    images = pictures(4)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        there = InceptionV3(state).to("cuda")(images.to("cuda"))
    assert (there.cpu() - net(images)).abs().max() < 2e-5 * there.abs().max()


# Weights.


def fault(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture(scope="module")
def files(state, tmp_path_factory) -> Iterator[Path]:
    """The same weights four times: with and without counters, as both kinds of pickle and as safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    full = InceptionV3(state).state_dict()
    assert len(full) == 566 and len(state) == 472
    torch.save(full, folder / NAMES[0])
    torch.save(state, folder / NAMES[1], _use_new_zipfile_serialization=False)
    save_file({name: value.contiguous() for name, value in full.items()}, folder / "full.safetensors")
    save_file(state, folder / "bare.safetensors")
    yield folder
    shutil.rmtree(folder)  # pytest would keep its hundreds of MB


def trust(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """As if this file were the published one."""
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])


def test_every_kind_of_file_gives_the_same(state, net, files, monkeypatch):
    images = pictures(1)
    features = net(images)
    for name in (*NAMES, "full.safetensors", "bare.safetensors"):
        trust(monkeypatch, files / name)
        network = InceptionV3(files / name)
        assert torch.equal(network(images), features), name
        assert network.weights_sha256 == net.weights_sha256, name
        assert network.describe() == {**net.describe(), "weights": Path(name).stem}


def test_the_digest_is_of_the_weights(state, net, net64):
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(f"{name} {tuple(state[name].shape)} ".encode() + state[name].numpy().tobytes())
    assert net.weights_sha256 == net64.weights_sha256 == total.hexdigest()
    other = {**state, "fc.bias": state["fc.bias"] + 1e-6}
    assert InceptionV3(other).weights_sha256 != net.weights_sha256


def test_describe(state, net):
    expected = {"name": "inception", "num_features": 2048, "sha256": net.weights_sha256}
    assert net.describe() == {**expected, "resize": "tf1", "dtype": "float32"}
    clean = InceptionV3(state, resize="clean", dtype=torch.float64)
    assert clean.describe() == {**expected, "resize": "clean", "dtype": "float64"}
    for old, now in (("antialias", "torchmetrics"), ("bilinear", "bilinear")):
        assert InceptionV3(state, resize=old).describe()["resize"] == now


def test_an_unknown_resize_is_told_before_weights_are_sought(monkeypatch):
    monkeypatch.setattr(inception, "find_weights", lambda given: pytest.fail("sought"))
    assert "resize 'lanczos' is unknown" in fault(lambda: InceptionV3(resize="lanczos"))


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """Nothing named, an empty cache (its folder is returned), and no way out to the network."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_: pytest.fail("the network was asked"))
    return tmp_path / "hub" / "checkpoints"


def test_the_order_of_places(places, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, dst, **_: Path(dst).touch())
    assert find_weights() == places / NAMES[0] and (places / NAMES[0]).is_file()  # downloaded
    (places / NAMES[0]).rename(places / NAMES[1])
    assert find_weights() == places / NAMES[1]
    (places / NAMES[0]).touch()
    assert find_weights(None) == places / NAMES[0]
    monkeypatch.setenv(VARIABLE, "")
    assert find_weights() == places / NAMES[0]
    named, given = tmp_path / "named.safetensors", tmp_path / "given.safetensors"
    named.touch(), given.touch()
    monkeypatch.setenv(VARIABLE, str(named))
    assert find_weights() == named
    assert find_weights(given) == find_weights(str(given)) == given
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_weights("~/given.safetensors") == given


def test_the_network_takes_what_is_found(files, net, places, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(files / "bare.safetensors"))
    assert InceptionV3().weights_sha256 == net.weights_sha256


def test_a_named_file_that_is_none(places, tmp_path, monkeypatch):
    """No search goes on behind the user's back."""
    places.mkdir(parents=True)
    (places / NAMES[0]).touch()
    message = fault(lambda: find_weights(tmp_path / "no.pth"))
    assert f"weights file {tmp_path / 'no.pth'} is not there" in message and NAMES[0] in message
    assert f"weights file {tmp_path} is a folder" in fault(lambda: InceptionV3(tmp_path))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "no.pth"))
    assert f"{VARIABLE}={tmp_path / 'no.pth'} is not there" in fault(find_weights)
    assert "is a folder" in fault(lambda: find_weights(""))


def test_the_download(places, monkeypatch):
    asked = []

    def download(url: str, dst: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        asked.append((url, dst, hash_prefix, progress))
        Path(dst).touch()

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    find_weights()
    find_weights()
    assert asked == [
        (URL, str(places / NAMES[0]), inception_weights.SHA256, False)
    ]  # once, and no bar: stderr is captured


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (urllib.error.URLError("no route"), "no route"),
        (urllib.error.HTTPError(URL, 404, "Not Found", {}, None), "404"),
        (RuntimeError('invalid hash value (expected "6726825d", got "1")\nmore'), "invalid hash value"),
        (IncompleteRead(b""), "IncompleteRead"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_download_that_fails(places, monkeypatch, error, told):
    def download(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    message = fault(InceptionV3)
    assert all(
        part in message
        for part in (told, NAMES[0], str(places), "neither weights nor", VARIABLE, URL, "copy it")
    )


class Response:
    """What urlopen gives: some bytes, then the end or a broken connection."""

    def __init__(self, breaks: bool) -> None:
        self.parts = iter([b"not the weights"])
        self.breaks = breaks

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def info(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(get_all=lambda name: None)

    def read(self, _: int) -> bytes:
        part = next(self.parts, b"")
        if not part and self.breaks:
            raise ConnectionResetError("connection reset")
        return part


@pytest.mark.parametrize(("breaks", "told"), [(False, "invalid hash value"), (True, "connection reset")])
def test_nothing_half_written_stays(places, monkeypatch, breaks, told):
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_, **__: Response(breaks))
    assert told in fault(find_weights)
    assert list(places.iterdir()) == []


def test_a_cache_that_cannot_be_made(places):
    places.parent.touch()
    assert f"not in {places}" in fault(find_weights)


def test_a_pickle_with_another_hash_is_not_opened(tmp_path, monkeypatch):
    path = tmp_path / NAMES[0]
    torch.save({}, path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    message = fault(lambda: InceptionV3(path))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(part in message for part in (str(path), sha256, "6726825d", "get it again", URL))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_run_even_with_the_right_hash(tmp_path, monkeypatch):
    path, mark = tmp_path / "evil.pth", tmp_path / "was_run"
    torch.save({"fc.weight": Evil(mark)}, path)
    trust(monkeypatch, path)
    assert f"weights file {path} cannot be read" in fault(lambda: read_weights(path))
    assert not mark.exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], {"model": {"fc.bias": torch.zeros(1)}}, torch.zeros(1)]
)
def test_a_pickle_of_something_else(tmp_path, monkeypatch, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    trust(monkeypatch, path)
    assert f"weights file {path} does not hold a flat state dict" in fault(lambda: read_weights(path))


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_damaged_files(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"weights.{suffix}"
    assert f"weights file {path} cannot be read" in fault(lambda: read_weights(path))  # it is not there
    tensors = {"fc.weight": torch.zeros(40, 40)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"<!DOCTYPE html>\n<html>\n</html>\n" * 9):
        path.write_bytes(content)
        trust(monkeypatch, path)
        message = fault(lambda: read_weights(path))
        assert f"weights file {path} cannot be read" in message and f"get it again from {URL}" in message
    path.unlink()
    path.mkdir()
    assert f"weights file {path} cannot be read" in fault(lambda: read_weights(path))


@pytest.mark.parametrize("name", ["weights.npz", "weights.bin", "weights"])
def test_other_kinds_of_file(tmp_path, name):
    (tmp_path / name).touch()
    message = fault(lambda: InceptionV3(tmp_path / name))
    assert f"weights file {tmp_path / name} is not of a known kind; use a .safetensors" in message


def test_files_of_another_network(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"fc.bias": torch.zeros(1008)}, path)
    assert f"{path} lacks tensors (471: Conv2d_1a_3x3.bn.bias, " in fault(lambda: InceptionV3(path))


def test_tensors_that_do_not_fit(state):
    def told(**changes: Tensor | None) -> str:
        changed = {name: value for name, value in {**state, **changes}.items() if value is not None}
        return fault(lambda: InceptionV3(changed))

    bad_fc = {"fc.weight": torch.zeros(1000, 2048)}
    nan = state["Mixed_6c.branch1x1.bn.running_var"].clone()
    nan[3] = torch.nan
    assert "the state dict lacks tensors (1: fc.bias); use" in told(**{"fc.bias": None})
    auxiliary = told(**{"AuxLogits.fc.bias": torch.zeros(1)})
    assert "the state dict has tensors that Inception does not have (1: AuxLogits.fc.bias); use" in auxiliary
    assert "fc.weight is (1000, 2048), not (1008, 2048); use" in told(**bad_fc)
    assert "running_var has values that are not finite; use" in told(
        **{"Mixed_6c.branch1x1.bn.running_var": nan}
    )
    infinite = torch.full((1008,), torch.inf)
    assert "fc.bias has values that are not finite" in told(**{"fc.bias": infinite})
