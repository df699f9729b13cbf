"""DINOv2 and CLIP features against transformers' own networks, fed what Pillow and NumPy make of images."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffkd.errors import UserError
from diffkd.metrics.features.clip import CLIP
from diffkd.metrics.features.dinov2 import DINOv2
from diffkd.metrics.features.vision import VisionFeatures

pytest.importorskip("transformers")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BOTH = pytest.mark.parametrize("kind", [DINOv2, CLIP])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[type, Any]:
    """Tiny random networks with dropout, in eval mode, saved by transformers; `.folder` says where."""
    import transformers
    from transformers.utils import logging as bars

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    configs = {
        # image_size 518 / 14 is the original's grid of position embeddings, so that 224 interpolates them
        DINOv2: transformers.Dinov2Config(
            **small, image_size=518,
            hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.4, drop_path_rate=0.4,
        ),
        CLIP: transformers.CLIPVisionConfig(
            **small, image_size=56, intermediate_size=64, projection_dim=24, attention_dropout=0.4
        ),
    }  # fmt: skip
    classes = {DINOv2: transformers.Dinov2Model, CLIP: transformers.CLIPVisionModelWithProjection}
    result = {}
    bars.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind, config in configs.items():
            network = classes[kind](config).eval().requires_grad_(False)
            for parameter in network.parameters():  # layer scales, norms and biases as well
                parameter.normal_(std=0.2).add_(0.2 if parameter.ndim == 1 else 0)
            network.folder = tmp_path_factory.mktemp(kind.__name__) / "model"
            network.save_pretrained(network.folder)
            result[kind] = network
    bars.enable_progress_bar()
    return result


@pytest.fixture
def copy(models: dict[type, Any], tmp_path: Path) -> Callable[[type], Path]:
    """copy(kind) -> a folder of that network that a test may spoil."""
    return lambda kind: Path(shutil.copytree(models[kind].folder, tmp_path / kind.__name__))


def images(*shape: int) -> Tensor:
    """Random uint8 pixels, each image darker than the one before it."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(pixels // np.arange(1, shape[0] + 1, dtype=np.uint8).reshape(-1, 1, 1, 1))


def reference_input(batch: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pillow's bicubic resize of each channel in float, clipped, then normalised by NumPy in float64."""
    resized = [
        [
            np.asarray(Image.fromarray(c.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))
            for c in image
        ]
        for image in batch.numpy()
    ]
    return normalised(np.clip(np.asarray(resized, dtype=np.float64), 0, 255), mean, std)


def cubic_weights(size: int, length: int) -> np.ndarray:
    """(size, length): the cubic convolution of Keys 1981 with a = -0.75 at half-pixel centres, no filter."""
    a = -0.75
    weights = np.zeros((size, length))
    for i in range(size):
        centre = (i + 0.5) * length / size - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - j)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            w = near if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(j, 0), length - 1)] += w
    return weights


def unfiltered_input(batch: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bicubic without antialias or clipping, as CMMD's code resizes."""
    rows, columns = cubic_weights(size, batch.shape[2]), cubic_weights(size, batch.shape[3])
    return normalised(rows @ batch.double().numpy() @ columns.T, mean, std)


def normalised(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    pixels = pixels / 255
    pixels = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    return torch.from_numpy(pixels.astype(np.float32))


@pytest.mark.parametrize("size", [(32, 32), (300, 260), (224, 224)])
def test_dinov2_is_the_cls_token_after_the_last_norm(models: dict[type, Any], size: tuple[int, int]) -> None:
    batch = images(2, 3, *size)
    network = models[DINOv2]
    x = reference_input(batch, 224, *IMAGENET)
    hidden = network.embeddings(x)
    for layer in network.encoder.layer:
        hidden = layer(hidden)
    cls = hidden[:, 0].double().numpy()
    cls = (cls - cls.mean(1, keepdims=True)) / np.sqrt(
        cls.var(1, keepdims=True) + network.config.layer_norm_eps
    )
    expected = cls * network.layernorm.weight.double().numpy() + network.layernorm.bias.double().numpy()

    features = DINOv2(network.folder)
    found = features(batch)

    assert features.num_features == 32 and features.size == 224
    assert found.shape == (2, 32) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=3e-6)
    np.testing.assert_allclose(found.numpy(), network(x).pooler_output.numpy(), rtol=0, atol=3e-6)
    assert np.abs(expected[0] - expected[1]).max() > 0.05  # the image is seen, far above the tolerance


@pytest.mark.parametrize("size", [(16, 24), (130, 90), (56, 56)])
def test_clip_is_the_projected_embedding_of_unit_norm(models: dict[type, Any], size: tuple[int, int]) -> None:
    batch = images(3, 3, *size)
    network = models[CLIP]
    x = unfiltered_input(batch, 56, *OPENAI)
    pooled = network.vision_model(pixel_values=x).pooler_output.double().numpy()
    embedding = pooled @ network.visual_projection.weight.double().numpy().T
    expected = embedding / np.sqrt((embedding**2).sum(1, keepdims=True))

    features = CLIP(str(network.folder))
    found = features(batch)

    assert features.num_features == 24 and features.size == 56
    assert found.shape == (3, 24) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.double().norm(dim=1).numpy(), 1, rtol=0, atol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


@BOTH
def test_a_batch_is_its_images_one_by_one(models: dict[type, Any], kind: type[VisionFeatures]) -> None:
    features, batch = kind(models[kind].folder), images(5, 3, 20, 20)
    one_by_one = torch.cat([features(image[None]) for image in batch])
    torch.testing.assert_close(features(batch), one_by_one, rtol=0, atol=1e-5)


@BOTH
def test_grey_is_rgb_of_three_equal_channels(models: dict[type, Any], kind: type[VisionFeatures]) -> None:
    features, grey = kind(models[kind].folder), images(2, 1, 28, 28)
    torch.testing.assert_close(features(grey), features(grey.repeat(1, 3, 1, 1)), rtol=0, atol=1e-6)


@BOTH
def test_eval_mode_is_locked_and_nothing_has_a_gradient(
    models: dict[type, Any], kind: type[VisionFeatures]
) -> None:
    features, batch = kind(models[kind].folder), images(2, 3, 20, 20)
    before = features(batch)
    assert features.train() is features
    torch.nn.Sequential(features).train()  # as a metric that holds it
    assert not any(module.training for module in features.modules())
    assert torch.equal(features(batch), before)  # dropout of 0.4 would show
    assert not before.requires_grad and not any(p.requires_grad for p in features.parameters())


@BOTH
def test_the_features_follow_the_dtype_of_the_weights(
    models: dict[type, Any], kind: type[VisionFeatures]
) -> None:
    features, batch = kind(models[kind].folder), images(2, 3, 20, 20)
    single = features(batch)
    double = features.double()(batch)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=0, atol=3e-6)


@pytest.mark.gpu
@BOTH
def test_images_go_to_the_device_of_the_weights(models: dict[type, Any], kind: type[VisionFeatures]) -> None:
    features, batch = kind(models[kind].folder), images(2, 3, 20, 20)
    expected = features(batch)
    found = features.to("cuda")(batch)
    assert found.device.type == "cuda"
    assert torch.equal(features(batch.to("cuda")), found)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=5e-3)


@BOTH
def test_the_digest_is_of_shapes_and_values(
    models: dict[type, Any], kind: type[VisionFeatures], copy: Callable[[type], Path]
) -> None:
    expected = hashlib.sha256()
    for value in models[kind].state_dict().values():
        expected.update(str(tuple(value.shape)).encode() + value.numpy().tobytes())
    folder = copy(kind)
    assert kind(folder).weights_sha256 == kind(models[kind].folder).weights_sha256 == expected.hexdigest()
    assert kind(folder).double().weights_sha256 == expected.hexdigest()

    state = load_file(folder / "model.safetensors")
    name = sorted(state)[3]
    state[name].view(-1)[0] += 1e-3
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert kind(folder).weights_sha256 != expected.hexdigest()


def test_the_digest_sees_weights_that_change_places(
    models: dict[type, Any], copy: Callable[[type], Path]
) -> None:
    folder = copy(CLIP)
    state = load_file(folder / "model.safetensors")
    q, k = (f"vision_model.encoder.layers.0.self_attn.{x}_proj.weight" for x in "qk")
    state[q], state[k] = state[k], state[q]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert CLIP(folder).weights_sha256 != CLIP(models[CLIP].folder).weights_sha256


def test_describe_is_all_that_a_protocol_records(models: dict[type, Any]) -> None:
    for kind, name, size, count, how in (
        (DINOv2, "dinov2", 224, 32, "clean"),
        (CLIP, "clip", 56, 24, "bicubic"),
    ):
        features = kind(models[kind].folder)
        found = features.describe()
        assert found == {
            "name": name, "sha256": features.weights_sha256, "num_features": count, "resize": how,
            "size": size, "weights": str(models[kind].folder),
        }  # fmt: skip
        assert json.loads(json.dumps(found)) == found


def test_half_precision_files_are_read_as_float32(
    models: dict[type, Any], copy: Callable[[type], Path]
) -> None:
    folder = copy(DINOv2)
    state = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16", "torch_dtype": "float16"}))
    found = DINOv2(folder).network.state_dict()
    for name, value in models[DINOv2].state_dict().items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value.half().float()), name


def test_weights_in_shards(models: dict[type, Any], tmp_path: Path) -> None:
    models[DINOv2].save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert DINOv2(tmp_path).weights_sha256 == DINOv2(models[DINOv2].folder).weights_sha256


def test_the_vision_tower_of_a_whole_clip(models: dict[type, Any], tmp_path: Path) -> None:
    """The hub's CLIP has a text tower too: its vision tower gives the same features as when saved alone."""
    folder = tmp_path / "clip"
    folder.mkdir()
    alone = models[CLIP]
    state = load_file(alone.folder / "model.safetensors")
    text = {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.tensor(math.log(100))}
    save_file(state | text, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "clip", "projection_dim": 24, "vision_config": alone.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    batch = images(2, 3, 20, 20)
    assert torch.equal(CLIP(folder)(batch), CLIP(alone.folder)(batch))
    assert CLIP(folder).weights_sha256 == CLIP(alone.folder).weights_sha256


@BOTH
def test_loading_says_nothing_and_changes_nothing(
    models: dict[type, Any],
    kind: type[VisionFeatures],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers.utils import logging as theirs

    before = (theirs.get_verbosity(), theirs.is_progress_bar_enabled(), torch.get_rng_state())
    with caplog.at_level(logging.INFO):
        kind(models[kind].folder)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def refusal(kind: type[VisionFeatures], weights: object) -> str:
    """The one line with which it is refused."""
    with pytest.raises(UserError) as caught:
        kind(weights)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def lose(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (DINOv2, "encoder.layer.1.norm1.weight"),
        (DINOv2, "layernorm.bias"),
        (CLIP, "visual_projection.weight"),
        (CLIP, "vision_model.encoder.layers.0.mlp.fc1.bias"),
    ],
)
def test_a_missing_weight_is_no_random_one(
    kind: type[VisionFeatures], name: str, copy: Callable[[type], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy(kind)
    lose(folder, name)
    message = refusal(kind, folder)
    assert message.startswith(f"{folder} has no {name} of the right shape, one of 1 weights that a ")
    assert message.endswith("would get at random; give a folder that has all of them")
    assert capfd.readouterr() == ("", "")


def test_a_weight_of_another_shape_is_no_random_one(copy: Callable[[type], Path]) -> None:
    folder = copy(CLIP)
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"] = torch.zeros(23, 32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "has no visual_projection.weight of the right shape" in refusal(CLIP, folder)


def test_another_model_is_refused(models: dict[type, Any], copy: Callable[[type], Path]) -> None:
    message = refusal(CLIP, models[DINOv2].folder)
    assert message == (
        f"{models[DINOv2].folder} is of model_type 'dinov2', not 'clip_vision_model', by its config.json; "
        "give the weights of a CLIPVisionModelWithProjection, such as openai/clip-vit-large-patch14-336"
    )
    folder = copy(DINOv2)
    (folder / "config.json").write_text("{}")
    assert "is of model_type None, not 'dinov2'" in refusal(DINOv2, folder)
    (folder / "config.json").write_text("[1]")
    assert "is of model_type None, not 'dinov2'" in refusal(DINOv2, folder)


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "dino', b"\xff\xfe\x00"])
def test_a_config_that_cannot_be_read(content: str | bytes | None, copy: Callable[[type], Path]) -> None:
    folder = copy(DINOv2)
    config = folder / "config.json"
    config.unlink()
    if content is not None:
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(DINOv2, folder)
    assert message.startswith(f"{folder} has no config.json that can be read (")
    assert message.endswith("; give a folder that save_pretrained wrote")


def test_a_config_of_wrong_values(copy: Callable[[type], Path]) -> None:
    folder = copy(DINOv2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
    assert f"{folder} cannot be loaded as a Dinov2Model (" in refusal(DINOv2, folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_truncated_safetensors(keep: int, copy: Callable[[type], Path]) -> None:
    folder = copy(DINOv2)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(DINOv2, folder)
    assert message.startswith(f"{folder} cannot be loaded as a Dinov2Model (")
    assert message.endswith("is it complete? copy or download it again")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    models: dict[type, Any], copy: Callable[[type], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(CLIP)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refusal(CLIP, folder)
    assert message.startswith(
        f"{folder} has no model.safetensors, and pickled weights are not loaded: they can"
    )
    # the command does what it says
    program = message.partition('python -c "')[2].partition('" and give DIR')[0]
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert CLIP(tmp_path / "DIR").weights_sha256 == CLIP(models[CLIP].folder).weights_sha256


@pytest.mark.parametrize("weights", ["nowhere", "/nowhere/at-all", "./nowhere/x", "~/x", "a/b/c"])
def test_neither_folder_nor_hub_id(weights: str) -> None:
    assert (
        refusal(CLIP, weights) == f"{weights} is neither a folder nor a hub id (owner/name); check the path"
    )


def test_a_file_is_no_folder(models: dict[type, Any]) -> None:
    file = models[CLIP].folder / "model.safetensors"
    assert refusal(CLIP, file).startswith(f"{file} is neither a folder nor a hub id")


@pytest.mark.parametrize(
    ("kind", "hub_id", "architecture"),
    [
        (DINOv2, "facebook/dinov2-large", "Dinov2Model"),
        (CLIP, "openai/clip-vit-large-patch14-336", "CLIPVisionModelWithProjection"),
    ],
)
def test_the_default_comes_from_the_hub_as_safetensors(
    kind: type[VisionFeatures],
    hub_id: str,
    architecture: str,
    models: dict[type, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    asked = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(models[kind].folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    features = kind()
    assert asked == [
        (hub_id, ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"])
    ]
    assert features.describe()["weights"] == hub_id
    assert features.weights_sha256 == kind(models[kind].folder).weights_sha256

    def unreachable(repo: str, *, allow_patterns: list[str]) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert refusal(kind, None) == (
        f"{hub_id} is not a folder here and could not be downloaded from the hub (no network); check the "
        "name, or run "
        f'python -c "from transformers import {architecture} as M; '
        f"M.from_pretrained('{hub_id}').save_pretrained('DIR')\" on a machine with a network, "
        "bring DIR here and give it as weights, or for a metric that brings the network along as "
        f"{'clip' if kind is CLIP else 'dinov2'}_weights"
    )


@BOTH
def test_without_transformers(
    kind: type[VisionFeatures], models: dict[type, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refusal(kind, models[kind].folder)
    assert message.startswith(f"feature network {kind.__name__.lower()} needs transformers (")
    assert message.endswith("); install it with pip install transformers")


def test_the_module_alone_imports_no_transformers() -> None:
    program = "import sys, diffkd.metrics.features.vision; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
