"""Pipelines of flows that are refused: in one line, before anything large is read."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest

from diffkd.errors import UserError
from diffkd.models import loading
from tests import flow_pipelines
from tests.edits import changed

FITTED = {"shift": 2.004020116745064, "shift_terminal": 0.5}  # the even grid of four steps at a shift of 3


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    work = tmp_path_factory.mktemp("teachers")
    for kind in ("sd3", "flux"):
        flow_pipelines.pipeline(work / "parts", kind).save_pretrained(work / kind, safe_serialization=True)
    return work


@pytest.fixture
def copied(teachers, tmp_path):
    """copied(kind): a teacher to change, with an empty card."""

    def get(kind):
        folder = tmp_path / kind
        shutil.copytree(teachers / kind, folder)
        (folder / "diffkd.json").write_text("{}")
        return folder

    return get


def refused(folder, says):
    with pytest.raises(UserError, match=says) as raised:
        loading.load(folder)
    assert "\n" not in str(raised.value)


VIDEO = ["diffusers", "CogVideoXTransformer3DModel"]


@pytest.mark.parametrize(
    ("kind", "path", "values", "says"),
    [
        ("sd3", "model_index.json", {"transformer": VIDEO}, "CogVideoX.*supported is SD3Transformer2DModel"),
        ("flux", "model_index.json", {"transformer": VIDEO}, "CogVideoX.*supported is FluxTransformer2DMode"),
        ("sd3", "model_index.json", {"_class_name": "StableDiffusion3ControlNetPipeline"},
         "supported are .*FluxPipeline.*StableDiffusion3Pipeline.*the nearest StableDiffusion3Pipeline"),
        ("flux", "model_index.json", {"_class_name": "FluxFillPipeline"}, "the nearest FluxPipeline"),
        ("flux", "model_index.json", {"_class_name": "WanPipeline"}, "WanPipeline, which is not a supported"),
        ("flux", "model_index.json", {"text_encoder_2": [None, None]}, "has a text_encoder_2 of .*T5Encoder"),
        ("sd3", "model_index.json", {"tokenizer_3": [None, None]}, "tokenizer_3 of .*T5TokenizerFast"),
        ("sd3", "model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "text_encoder of"),
        ("sd3", "model_index.json", {"vae": ["diffusers", "VQModel"]}, "autoencoder of type"),
        ("sd3", "model_index.json", {"controlnet": ["diffusers", "X"]}, "component 'controlnet'"),
        ("sd3", "transformer/config.json", {"qk_norm": "layer_norm"}, "qk_norm 'layer_norm'"),
        ("sd3", "transformer/config.json", {"out_channels": 8}, "in_channels 4 and out_channels 8"),
        ("sd3", "transformer/config.json", {"sample_size": [8, 8]}, "sample_size .*positive integer"),
        ("sd3", "transformer/config.json", {"sample_size": 64}, "too few places"),
        ("sd3", "transformer/config.json", {"pos_embed_max_size": 9999}, "pos_embed_max_size 9999"),
        ("sd3", "transformer/config.json", {"joint_attention_dim": 64}, "widths 16, 24, 48, .*takes 64"),
        ("sd3", "transformer/config.json", {"pooled_projection_dim": 40}, "pooled embeddings are 36 wide"),
        ("flux", "transformer/config.json", {"in_channels": 64}, "in_channels 64, and patches of .* have 16"),
        ("flux", "transformer/config.json", {"out_channels": 8}, "of an editing or a control pipeline"),
        ("flux", "transformer/config.json", {"patch_size": 2}, "patch_size 2"),
        ("flux", "transformer/config.json", {"guidance_embeds": "yes"}, "guidance_embeds 'yes'"),
        ("flux", "transformer/config.json", {"axes_dims_rope": [2, 2, 2]}, "fails when it is called"),
        ("flux", "transformer/config.json", {"joint_attention_dim": 20}, "widths 24 and 16, .*takes 20 and"),
        ("flux", "vae/config.json", {"shift_factor": None}, "shift_factor None, which is no number"),
        ("sd3", "text_encoder_3/config.json", {"model_type": "umt5"}, "model_type 'umt5'.*Model is t5"),
        ("sd3", "text_encoder_3/config.json", {"d_model": 1 << 20}, "much larger than its weights"),
        ("sd3", "scheduler/scheduler_config.json", {"invert_sigmas": True}, "has invert_sigmas True"),
        ("sd3", "scheduler/scheduler_config.json", {"shift": "x"}, "cannot build|out of range"),
        ("flux", "scheduler/scheduler_config.json", {"base_shift": "x"}, "cannot build"),
        ("sd3", "diffkd.json", {"call": {"height": 0}}, "of no size of images"),
        ("sd3", "diffkd.json", {"absent": [3]}, "absent .*which is not components"),
    ],
)  # fmt: skip
def test_what_is_refused(copied, kind, path, values, says):
    folder = copied(kind)
    changed(folder, path, **values)
    refused(folder, says)


@pytest.mark.parametrize(
    ("kind", "lost", "says"),
    [
        ("sd3", "tokenizer_3/*", "no tokenizer in .*tokenizer_3 .tokenizer.json or spiece.model"),
        ("sd3", "text_encoder_2/*.safetensors", "no safetensors"),
        ("flux", "text_encoder_2", "no folder text_encoder_2"),
        ("flux", "tokenizer/*", "no tokenizer in .*vocab.json, merges.txt"),
        ("flux", "vae/*.safetensors", "no safetensors"),
    ],
)
def test_what_is_missing(copied, kind, lost, says):
    folder = copied(kind)
    for path in folder.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(folder, says)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_network_alone(teachers, kind):
    refused(teachers / kind / "transformer", "alone, without its text encoders and its autoencoder")


def test_a_scheduler_of_betas(copied):
    folder = copied("sd3")
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    changed(folder, "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    refused(folder, "DDIMScheduler is not of a flow")


@pytest.mark.parametrize(
    ("kind", "card", "scheduler", "says"),
    [
        (
            "sd3",
            {"steps": 4},
            {},
            "the sigmas 1, 0.8577, 0.6022, 0.008929 in 4 steps.*save it with a FlowMap",
        ),
        ("sd3", {"steps": 8}, FITTED, "gives the stock pipeline the sigmas"),
        ("sd3", {"steps": 1, "sampler": "renoise"}, {}, "drawn by renoise.*stochastic_sampling False"),
        ("flux", {"steps": 4}, {}, "describes a student, and its .* has use_dynamic_shifting"),
        ("flux", {"steps": 4}, {"use_dynamic_shifting": False, "stochastic_sampling": True}, "drawn by ddim"),
        ("flux", {"steps": 4, "num_train_timesteps": 900}, {"use_dynamic_shifting": False}, "timesteps 900"),
        ("flux", {"steps": 2000}, {"use_dynamic_shifting": False}, "has steps 2000; use 1 to 1000"),
    ],
)
def test_a_card_that_its_scheduler_does_not_keep(copied, kind, card, scheduler, says):
    folder = copied(kind)
    changed(folder, "scheduler/scheduler_config.json", **scheduler)
    (folder / "diffkd.json").write_text(json.dumps(card))
    refused(folder, says)


def test_a_card_that_its_scheduler_keeps(copied):
    folder = copied("sd3")
    changed(folder, "scheduler/scheduler_config.json", **FITTED)
    (folder / "diffkd.json").write_text(json.dumps({"steps": 4}))
    assert loading.load(folder).schedule.law.shift == 3.0


@pytest.mark.parametrize(
    ("kind", "size", "says"),
    [
        ("sd3", (36, 32), "do not divide by 8, the scale of the tokens"),
        ("flux", (32, 36), "do not divide by 8, the scale of the tokens"),
        ("sd3", (128, 128), "more places than .* knows; use up to 64 pixels a side"),
    ],
)
def test_sizes_of_images(teachers, kind, size, says):
    codec = loading.load(teachers / kind).codec
    assert codec.shape(48, 64) == (4, 12, 16)
    with pytest.raises(UserError, match=says):
        codec.shape(*size)
