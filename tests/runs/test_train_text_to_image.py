"""`diffkd train` of a text-to-image model: from captioned shapes to a stock pipeline, and on to a student."""

from __future__ import annotations

import json
import signal
import unicodedata

import diffusers
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import diffkd
from diffkd.core.autoencoder import ImageAutoencoder
from diffkd.data.shapes import Shapes
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.models.new.prompts import NewTextEncoder, Tokens, learn_tokenizer
from diffkd.runs.latent_teacher.autoencoding import Autoencoding
from tests.refusals import refuse
from tests.runs.tiny import log, records, signal_at

CONFIG = {
    "out": "teacher",
    "data": {"kind": "shapes", "count": 64},
    "model": {
        "kind": "text_to_image",
        "autoencoder": {"channels": [8, 8, 8], "norm_groups": 4},
        "text": {"width": 16, "heads": 2, "layers": 1},
        "unet": {"channels": [8, 16], "attention": [False, True], "norm_groups": 4, "heads": 2},
    },
    "schedule": {"num_train_timesteps": 64},
    "autoencoding": {"updates": 3, "warmup": 0},
    "denoising": {"updates": 3, "warmup": 0},
    "training": {"batch_size": 8, "log_every": 1, "checkpoint_every": 1},
    "evaluation": {
        "features": "shapes", "metrics": ["fid", "prompt_accuracy"], "samples": 32, "teacher_steps": [4],
    },
    "pictures": 4,
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def test_a_teacher_is_trained_and_distilled(cli, here):
    outcome = cli("train", "teacher.yaml")
    assert outcome.code == 0, outcome.stderr
    (record,) = records(here / "teacher")
    assert 0 <= record["prompt_accuracy"] <= 1 and record["fid"] > 0
    assert record["protocol"]["prompts"]["count"] == 32 and record["protocol"]["guidance"] == 3.0
    assert {line["stage"] for line in log(here / "teacher")} == {"autoencoder", "denoising"}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(here / "teacher" / "teacher", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.unet.config.down_block_types == ["DownBlock2D", "CrossAttnDownBlock2D"]
    assert pipeline.unet.config.up_block_types == ["CrossAttnUpBlock2D", "UpBlock2D"]
    prompts = ["a small red ring above a large blue square", "a star"]
    theirs = pipeline(
        prompts, num_inference_steps=4, guidance_scale=3.0, output_type="np",
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
    ).images  # fmt: skip
    teacher = diffkd.load(here / "teacher" / "teacher")
    assert teacher.label_dropout == 0.1  # so that it may be guided
    (ours,) = diffkd.generate(teacher, 2, prompts=prompts, steps=4, guidance=3.0)
    assert np.abs(ours.numpy().astype(int) - np.rint(theirs * 255)).max() <= 1
    # its latents have about unit spread
    mean, _ = teacher.codec.moments(
        torch.from_numpy(Shapes(kind="shapes", count=64).load().pixels) / 127.5 - 1
    )
    assert mean.std().item() == pytest.approx(1, rel=0.01)
    # and it is distilled
    content = {
        "out": "run", "teacher": {"train": "teacher.yaml"}, "data": CONFIG["data"],
        "method": {"name": "progressive", "steps": [2], "updates": 2, "guidance": 3.0},
        "training": CONFIG["training"], "evaluation": CONFIG["evaluation"], "pictures": 4,
    }  # fmt: skip
    (here / "distill.yaml").write_text(yaml.safe_dump(content))
    outcome = cli("distill", "distill.yaml")
    assert outcome.code == 0, outcome.stderr
    assert [(r["model"], r["nfe"]) for r in records(here / "run")] == [("teacher", 8), ("2-steps", 2)]
    assert all("prompt_accuracy" in record for record in records(here / "run"))


def test_a_teacher_that_never_learnt_no_prompt_is_not_guided(cli, here):
    """Whoever asks for that; against a prompt that it may know, or once a student has learnt it, it is."""
    short = ("evaluation=null", "pictures=0", "autoencoding.updates=1", "denoising.updates=1")
    assert cli("train", "teacher.yaml", *short, "denoising.label_dropout=0", "guidance=1").code == 0
    assert json.loads((here / "teacher/teacher/diffkd.json").read_text())["label_dropout"] == 0
    content = {
        "out": "run", "teacher": {"path": "teacher/teacher"}, "data": CONFIG["data"], "evaluation": None,
        "pictures": 0, "training": CONFIG["training"], "method": {"name": "guidance"},
    }  # fmt: skip
    (here / "run.yaml").write_text(yaml.safe_dump(content))
    guidance = {"name": "guidance", "range": [1, 5], "updates": 1}
    says = ["teacher/teacher was trained without leaving out prompts", "label_dropout 0", "guidance 1, or"]
    for method in (
        guidance,
        {"name": "lcm", "guidance": [3, 5], "steps": [2]},
        {"name": "lcm", "guidance": 3.0, "steps": [2]},
        {"name": "progressive", "guidance": 3.0, "steps": [2]},
    ):
        refuse(cli, here, "distill", "run.yaml", f"method={json.dumps(method)}", says=says)
    draw = ("sample", "teacher/teacher", "-w", 3, "--steps", 2, "--prompt", "a star", "--out")
    refuse(cli, here, *draw, here / "guided", says=says)
    assert cli(*draw, here / "led-away", "--negative", "a ring").code == 0
    chain = [{"name": "denoising", "updates": 1, "label_dropout": 0.3}, guidance]
    outcome = cli("distill", "run.yaml", f"method={json.dumps(chain)}")
    assert outcome.code == 0, outcome.stderr
    for student in (here / "run/students").iterdir():
        assert json.loads((student / "diffkd.json").read_text())["label_dropout"] == 0.3


@pytest.mark.parametrize("stage", ["autoencoder", "denoising"])
def test_stopped_and_resumed_it_ends_with_the_same_bits(cli, here, monkeypatch, stage):
    given = ("train", "teacher.yaml", "evaluation=null", "pictures=0")
    assert cli(*given, "out=whole").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, stage, 1, send=[signal.SIGTERM])
        assert cli(*given, "out=broken").code == 130
    assert cli(*given, "out=broken").code == 0
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        one, other = (
            load_file(here / out / "teacher" / part / f"{stem}.safetensors") for out in ("whole", "broken")
        )
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert log(here / "whole") == log(here / "broken")


def test_the_tokenizer_knows_the_words_of_the_captions():
    captions = Shapes(kind="shapes", count=500).load().captions
    config = NewTextEncoder()
    one, again = (learn_tokenizer(captions, config) for _ in range(2))
    assert one.get_vocab() == again.get_vocab() and len(one) <= config.vocabulary
    words = ["a", "small", "red", "ring", "above", "a", "large", "blue", "square"]
    tokens = one.tokenize(" ".join(words))
    assert tokens == [
        f"{word}</w>" for word in ["a", "small", "red", "ring", "above", "a", "large", "blue", "square"]
    ]
    ids = Tokens(one, 24).embed(["a star", "two zebras"])["input_ids"]
    assert ids.shape == (2, 24) and (ids[0] != ids[1]).any()
    assert one.decode(ids[0], skip_special_tokens=True).strip() == "a star"
    assert Tokens(one, 24).key != Tokens(one, 20).key


@pytest.mark.parametrize(
    "captions",
    [
        ["красное кольцо над синим квадратом", "звезда"],
        ["赤い輪 🔥", "青い四角 ❤"],
        ["a café , near : the sea !", "l ' e\u0301té , été"],
        ["A_B (x) 32", "\u00a0ÅÉ\u2028straße ﬁn"],
    ],
)
def test_the_tokenizer_reads_captions_of_any_script(captions):
    """Nothing in them is unknown to it, and none is read as another; spelled back they are as they were."""
    tokenizer = learn_tokenizer(captions, NewTextEncoder(length=48))
    ids = Tokens(tokenizer, 48).embed(captions)["input_ids"].tolist()
    for text, row in zip(captions, ids, strict=True):
        end = row.index(tokenizer.eos_token_id)
        assert end > 1 and {*row[end:]} == {tokenizer.eos_token_id}  # which stands for the unknown too
        spelled = "".join(tokenizer.decode(row, skip_special_tokens=True).split())
        assert spelled == "".join(unicodedata.normalize("NFC", text).lower().split())
    assert ids[0] != ids[1]
    with pytest.raises(UserError, match=r"vocabulary 100 has no room for the \d+ letters .* use \d+ or more"):
        learn_tokenizer(["".join(map(chr, range(0x400, 0x480)))], NewTextEncoder(vocabulary=100))


def test_the_autoencoders_loss_by_hand():
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    student = ImageAutoencoder(vae)
    method = Autoencoding(kl=0.1)
    x0 = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch, step = Batch(x0, {}), Step(method.stages(student)[0], 0)
    (loss,) = method.losses({"student": student}, batch, step, torch.Generator().manual_seed(1))
    latents = vae.encode(x0).latent_dist
    z = latents.mean + latents.std * torch.randn(
        latents.mean.shape, generator=torch.Generator().manual_seed(1)
    )
    divergence = (latents.mean**2 + latents.var - 1 - latents.logvar).sum((1, 2, 3)) / 2
    away = vae.decode(z).sample - x0
    expected = (away.abs() + away**2).mean((1, 2, 3)) + 0.1 * divergence
    assert torch.allclose(loss.value, expected.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("data={kind: digits}",), ["digits", "no captions"]),
        (("data.side=34",), ["34x34", "divide by 4"]),
        (("model.unet.attention=[true]",), ["attention [True]", "each of channels [8, 16]"]),
        (("model.unet.attention=[false,false]",), ["attention [False, False]", "true at least once"]),
        (("model.text.wide=3",), ["model.text.wide", "width"]),
        (("denoising.label_dropout=0",), ["label_dropout 0", "guidance 3", "use 0.1, or guidance 1"]),
    ],
)
def test_what_is_refused(cli, here, changes, says):
    outcome = cli("train", "teacher.yaml", *changes)
    assert outcome.code == 2 and all(word in outcome.stderr for word in says), outcome.stderr
    assert not (here / "teacher").exists()


def test_a_config_says_all_that_it_means(cli, here):
    outcome = cli("train", "teacher.yaml", "--dry-run")
    content = yaml.safe_load(outcome.stdout)
    assert content["model"]["text"]["vocabulary"] == 400 and content["autoencoding"]["kl"] == 1e-6
    assert json.dumps(content["model"]["unet"]["channels"]) == "[8, 16]"


@pytest.mark.slow
def test_two_processes_train_what_one_does(here, launched):
    """Autoencoder, UNet and text encoder, up to the order of a sum."""
    given = ("train", "teacher.yaml", "evaluation=null", "pictures=0", "training.micro_batches=2")
    for world in (1, 2):
        done = launched(world, *given, f"out=out-{world}")
        assert done.returncode == 0, done.stderr[-3000:]
    for part in ("vae", "unet", "text_encoder"):
        paths = [next((here / f"out-{world}/teacher" / part).glob("*.safetensors")) for world in (1, 2)]
        one, other = map(load_file, paths)
        away = max((one[key] - other[key]).abs().max().item() for key in one)
        assert away < 1e-4, part
