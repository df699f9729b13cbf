"""The files that people have: variants and shards of weights, training checkpoints, networks alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffkd.errors import UserError
from diffkd.models import loading
from diffkd.models.source import holds_model

PLAIN = "diffusion_pytorch_model.safetensors"


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "diffkd"]


def resaved(folder: Path, variant: str | None, *, scale: float = 1.0, **options: Any) -> None:
    """The network of a pipeline, all weights times `scale`, saved beside what there is."""
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    for parameter in network.parameters():
        parameter.data *= scale
    network.half() if variant == "fp16" else network
    network.save_pretrained(folder / "unet", variant=variant, **options)


def first(denoiser: Any) -> torch.Tensor:
    weight: torch.Tensor = denoiser.network.conv_in.weight.detach()
    return weight


# variants -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["whole", "sharded"])
def options(request) -> dict[str, Any]:
    return {} if request.param == "whole" else {"max_shard_size": "10KB"}


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_the_only_variant_opens_without_being_named(variant, options, tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    weight = first(loading.load(folder))
    resaved(folder, variant, **options)
    (folder / "unet" / PLAIN).unlink()
    for asked in (None, variant):
        again = loading.load(folder, variant=asked)
        assert again.dtype == torch.float32 and torch.allclose(first(again), weight, atol=1e-3)
        stock = loading.open_stock(folder, asked)
        assert torch.equal(stock.unet.conv_in.weight.float(), first(again))
    for way in (loading.load, loading.open_stock):
        with pytest.raises(UserError, match=f"bf16.*{variant}|no weights of variant bf16"):
            way(folder, variant="bf16")


def test_the_plain_weights_are_read_unless_a_variant_is_named(options, tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    weight = first(loading.load(folder))
    resaved(folder, "non_ema", scale=2.0, **options)
    resaved(folder, "fp16", scale=1.0, **options)
    for way in (loading.load, lambda place, **kw: Stock(loading.open_stock(place, **kw))):
        assert torch.equal(first(way(folder)), weight)
        assert torch.equal(first(way(folder, variant="non_ema")), 2 * weight)
    assert loading.load(folder, variant="non_ema").opened_with == {"variant": "non_ema"}
    (folder / "unet" / PLAIN).unlink()
    with pytest.raises(UserError, match="no plain weights in .*, only fp16, non_ema; name one of these"):
        loading.load(folder)


class Stock:
    def __init__(self, pipeline: Any) -> None:
        self.network = pipeline.unet


def test_weights_of_two_dtypes_are_float32_as_in_the_stock_pipeline(tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    path = folder / "unet" / PLAIN
    tensors = load_file(path)
    save_file({k: v.half() if k == "conv_in.bias" else v for k, v in tensors.items()}, path, {"format": "pt"})
    assert {p.dtype for p in loading.load(folder).network.parameters()} == {torch.float32}
    assert {p.dtype for p in loading.open_stock(folder).unet.parameters()} == {torch.float32}


# shards ---------------------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    index = next(folder.glob("*.index*.json"))
    shard = sorted(folder.glob("*-of-*.safetensors"))[2]
    tensors = json.loads(index.read_text())["weight_map"]
    if how == "a shard is missing":
        shard.unlink()
    elif how == "a shard is truncated":
        shard.write_bytes(shard.read_bytes()[:20])
    elif how == "a shard lacks its tensor":
        shutil.copy(sorted(folder.glob("*-of-*.safetensors"))[3], shard)
    elif how == "the map is empty":
        rewrite(index, weight_map={})
    elif how == "the map is a list":
        rewrite(index, weight_map=[*tensors])
    elif how == "a shard is a link out":
        rewrite(index, weight_map={**tensors, "conv_out.weight": "../" + shard.name})


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(
    "how",
    ["a shard is missing", "a shard is truncated", "a shard lacks its tensor", "the map is empty",
     "the map is a list", "a shard is a link out"],
)  # fmt: skip
def test_every_shard_is_checked(how, variant, tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    resaved(folder, variant, max_shard_size="10KB")
    (folder / "unet" / PLAIN).unlink(missing_ok=True)
    damage(folder / "unet", how)
    for way in (loading.load, loading.open_stock):
        with pytest.raises(UserError, match="complete|lack|not a safetensors file"):
            way(folder)


# networks alone -------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path, make_pipeline) -> Path:
    """What diffusers' unconditional training script leaves: a pipeline, a checkpoint with both networks."""
    from diffusers.training_utils import EMAModel

    folder = make_pipeline(tmp_path, name="output", pipeline="DDPMPipeline")
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    averaged = EMAModel(network.parameters(), model_cls=diffusers.UNet2DModel, model_config=network.config)
    averaged.shadow_params = [2 * parameter for parameter in averaged.shadow_params]
    averaged.optimization_step = 3_000_000
    averaged.save_pretrained(folder / "checkpoint-500" / "unet_ema")
    network.save_pretrained(folder / "checkpoint-500" / "unet")
    return folder


def test_a_checkpoint_is_its_averaged_weights(output, caplog):
    """The noise scheduler is that of the pipeline around it."""
    plain = loading.load(output)
    checkpoint = loading.load(output / "checkpoint-500")
    assert said(caplog) == [f"{output / 'checkpoint-500'}: the network in unet_ema is used"]
    assert torch.equal(first(checkpoint), 2 * first(plain))
    assert torch.equal(checkpoint.schedule.alphas_cumprod, plain.schedule.alphas_cumprod)
    assert (checkpoint.prediction, checkpoint.clip) == (plain.prediction, plain.clip)
    for name, factor in (("unet", 1), ("unet_ema", 2)):
        assert torch.equal(first(loading.load(output / "checkpoint-500" / name)), factor * first(plain))
    assert torch.equal(first(loading.load(output / "unet")), first(plain))


def test_a_scheduler_has_to_be_named_where_there_is_none(output, tmp_path):
    alone = Path(shutil.copytree(output / "checkpoint-500", tmp_path / "far" / "away" / "checkpoint-500"))
    with pytest.raises(
        UserError, match="a network without its noise scheduler; name the one .* scheduler: a"
    ):
        loading.load(alone)
    own = loading.load(output)
    for named in (output, output / "scheduler", output / "scheduler" / "scheduler_config.json"):
        denoiser = loading.load(alone, scheduler=str(named))
        assert torch.equal(denoiser.schedule.alphas_cumprod, own.schedule.alphas_cumprod)
        assert denoiser.prediction == "v_prediction"
    denoiser = loading.load(alone, scheduler="DDPMScheduler")
    assert denoiser.prediction == "epsilon" and denoiser.schedule.num_train_timesteps == 1000
    for wrong in ("DDPM", "FlowMatchEulerDiscreteScheduler", str(tmp_path), str(output / "model_index.json")):
        with pytest.raises(UserError, match="scheduler"):
            loading.load(alone, scheduler=wrong)


def test_a_scheduler_in_place_of_a_pipelines_own(output):
    denoiser = loading.load(output, scheduler="DDPMScheduler")
    assert denoiser.prediction == "epsilon" and denoiser.opened_with == {"scheduler": "DDPMScheduler"}


def test_folders_that_are_no_model_say_what_to_give(output, tmp_path):
    (output / "model_index.json").unlink()
    shutil.rmtree(output / "unet")
    with pytest.raises(
        UserError, match=r"no model_index.json; give one of its checkpoints \(checkpoint-500\)"
    ):
        loading.load(output)
    with pytest.raises(UserError, match="no model_index.json; give the folder that has it"):
        loading.load(tmp_path)
    weights = output / "checkpoint-500" / "unet" / PLAIN
    with pytest.raises(UserError, match="weights without their config; give the folder"):
        loading.load(weights)
    with pytest.raises(UserError, match="a network alone, and the stock sampler is a pipeline's"):
        loading.open_stock(output / "checkpoint-500")
    assert holds_model(output / "checkpoint-500") and not holds_model(output)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["model.diffusion_model.x", "cond_stage_model.x"],
            r"diffusers.StableDiffusionPipeline.from_single_",
        ),
        (["conditioner.embedders.0.x", "model.diffusion_model.x"], r"diffusers.StableDiffusionXLPipeline.fr"),
        (
            ["model.diffusion_model.joint_blocks.x"],
            r"ITS_PIPELINE.from_single_file\('.*m.safetensors'\).save_",
        ),
        (["lora_unet_x.lora_down.weight"], r"is an adapter \(LoRA\) without the model"),
        (["x"], "weights without their config"),
    ],
)
def test_files_of_other_programs_are_said_by_what_they_are(tmp_path, names, says):
    """The file itself, and a folder that has nothing else."""
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "m.safetensors")
    for given in (tmp_path / "m.safetensors", tmp_path):
        with pytest.raises(UserError, match=says):
            loading.load(given)


def test_another_network_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "HunyuanDiT2DModel"}')
    (tmp_path / PLAIN).touch()
    with pytest.raises(UserError, match="a HunyuanDiT2DModel, which is not a supported network; .*UNet2DM"):
        loading.load(tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gguf"])
def test_quantized_weights_are_refused_with_a_way_on(method, tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    quantization = {"quant_method": method, "load_in_8bit": True}
    rewrite(folder / "unet/config.json", quantization_config=quantization)
    for way in (loading.load, loading.open_stock):
        with pytest.raises(UserError, match=f"quantized by '{method}', and are not opened; take the weights"):
            way(folder)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a broken link"])
@pytest.mark.parametrize(
    "name",
    ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "diffkd.json",
     f"unet/{PLAIN}"],
)  # fmt: skip
def test_what_is_no_file_is_neither_waited_for_nor_passed_over(name, kind, tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else tmp_path / "nowhere")
    with pytest.raises(UserError, match=path.name if kind != "a broken link" else "complete|no safetensors"):
        loading.load(folder)
    if name != "diffkd.json":
        with pytest.raises(UserError):
            loading.open_stock(folder)


@pytest.mark.parametrize("way", [loading.load, loading.open_stock])
def test_a_tensor_of_another_name(way, tmp_path, make_pipeline):
    """As many numbers as there should be, and one tensor that the network has no place for."""
    folder = make_pipeline(tmp_path)
    tensors = load_file(folder / "unet" / PLAIN)
    tensors["conv_in.wait"] = tensors.pop("conv_in.weight")
    save_file(tensors, folder / "unet" / PLAIN, {"format": "pt"})
    with pytest.raises(UserError, match="lack conv_in.weight"):
        way(folder)


def test_a_config_of_a_smaller_network_than_the_weights_are_of(tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "mid_block_type": None}))
    with pytest.raises(UserError, match=r"hold mid_block\.\S+, of which its config\.json knows nothing"):
        loading.load(folder)
    with pytest.raises(UserError, match=r"unet are [\d,]+, more than its config\.json has a place for"):
        loading.open_stock(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_nothing_of_diffusers_own_is_on_the_screen(variant, cli, tmp_path, make_pipeline, monkeypatch):
    folder = make_pipeline(tmp_path)
    resaved(folder, variant, max_shard_size="10KB")
    (folder / "unet" / PLAIN).unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("sample", folder, "--steps", 1, "-n", 2, "--out", "o.npz")
    assert (code, err) == (0, "")
    args = ["--steps", 1, "--samples", 8, "--reference", "digits", "--sampler", "stock"]
    code, _, err = cli("evaluate", folder, *args)
    assert (code, err) == (0, "")


# the commands ---------------------------------------------------------------------------------------------


def test_the_commands_take_them(cli, output, tmp_path, monkeypatch, drawn):
    """The same pixels by each way to name the same weights, and a record that opens the same model again."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    resaved(output, "non_ema", scale=1.5)
    alone = shutil.copytree(output / "unet", tmp_path / "far" / "away" / "alone")
    options = ["-n", 4, "--steps", 2]
    for out, args in {
        "named": [output, "--variant", "non_ema"],
        "alone": [alone, "--variant", "non_ema", "--scheduler", output],
        "plain": [output],
    }.items():
        code, _, err = cli("sample", *args, *options, "--out", f"{out}.npz")
        assert (code, err) == (0, "")
    named, same, plain = (np.load(f"{name}.npz")["arr_0"] for name in ("named", "alone", "plain"))
    assert np.array_equal(named, same) and not np.array_equal(named, plain)

    how = ["--steps", 1, "--samples", 8, "--variant", "non_ema", "--scheduler", output]
    assert cli("evaluate", alone, "--reference", "digits", *how, "--out", "record.json").code == 0
    where = json.loads(Path("record.json").read_text())["protocol"]["target"]
    assert (where["variant"], where["scheduler"]) == ("non_ema", str(output))
    assert cli("evaluate", "--repeat", "record.json").code == 0
    code, _, err = cli("evaluate", output, "--reference", "digits", "--sampler", "stock", *how)
    assert code == 2 and "leave out --scheduler" in err


def test_a_config_takes_them(output, tmp_path):
    from diffkd.runs.benchmark_config import BenchmarkEntry
    from diffkd.runs.config import Teacher

    resaved(output, "non_ema", scale=1.5)
    alone = shutil.copytree(output / "unet", tmp_path / "far" / "away" / "alone")
    teacher = Teacher(path=str(alone), variant="non_ema", scheduler=str(output)).load()
    assert torch.equal(first(teacher), 1.5 * first(loading.load(output)))
    entry = BenchmarkEntry(path=str(alone), variant="non_ema", scheduler=str(output))
    assert entry.opening == {"variant": "non_ema", "scheduler": str(output)}
    with pytest.raises(ValueError, match="teacher.variant is for teacher.path"):
        Teacher(train=tmp_path / "teacher.yaml", variant="fp16")
