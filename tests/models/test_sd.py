"""Stable Diffusion and SDXL: the stock pipeline's encoding, loop and images; students that open in it."""

from __future__ import annotations

import json
import shutil
import warnings

import diffusers
import numpy as np
import pytest
import torch

from diffkd.core import samplers
from diffkd.core.guidance_kinds import set_kind
from diffkd.errors import UserError
from diffkd.models import codecs, guidance_input, loading, saving
from tests import text_to_image
from tests.edits import changed

PROMPTS = ["a small red ring above a large blue square", "two stars", ""]


# of 2.1 the UNet's own: linear projections, another number of heads for each resolution
LAYOUTS = {
    "sd": {},
    "sd21": {"use_linear_projection": True, "attention_head_dim": [2, 4]},
    "xl": {"xl": True},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def stock(request, tmp_path_factory):
    """A stock pipeline and the folder that it was saved to."""
    work = tmp_path_factory.mktemp(request.param)
    prediction = "v_prediction" if request.param == "sd21" else "epsilon"
    made = text_to_image.pipeline(work / "parts", prediction=prediction, **LAYOUTS[request.param])
    made.save_pretrained(work / "teacher", safe_serialization=True)
    return made, work / "teacher"


def is_xl(pipeline):
    return isinstance(pipeline, diffusers.StableDiffusionXLPipeline)


def latents(count, seed=0):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])


def conditioned(denoiser, prompts):
    denoiser.set_null(denoiser.conditioner.null())
    return denoiser.conditioner.embed(prompts, size=(32, 32))


def test_prompts_are_encoded_as_the_pipeline_does(stock):
    pipeline, folder = stock
    denoiser = loading.load(folder)
    cond, null = conditioned(denoiser, PROMPTS), denoiser.null
    given, none, *pooled = pipeline.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    assert torch.allclose(cond["encoder_hidden_states"], given, atol=1e-6)
    assert torch.allclose(null["encoder_hidden_states"].expand_as(none), none, atol=1e-6)
    if is_xl(pipeline):
        assert torch.allclose(cond["text_embeds"], pooled[0], atol=1e-6)
        assert not null["text_embeds"].any() and not null["encoder_hidden_states"].any()
        assert cond["time_ids"].tolist() == [[32.0, 32, 0, 0, 32, 32]] * 3
    negative = denoiser.conditioner.null("blue")
    _, none, *pooled = pipeline.encode_prompt(
        ["x"],
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=["blue"],
    )
    assert torch.allclose(negative["encoder_hidden_states"], none, atol=1e-6)
    if is_xl(pipeline):
        assert torch.allclose(negative["text_embeds"], pooled[1], atol=1e-6)


def test_a_long_prompt_is_cut_and_a_line_says_what_is_lost(stock, caplog):
    pipeline, folder = stock
    prompt = ["q" * 100 + " end"]
    cond = loading.load(folder).conditioner.embed(prompt, size=(32, 32))
    (line,) = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
    assert "77 tokens" in line and "end" in line
    given = pipeline.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.allclose(cond["encoder_hidden_states"], given[0], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_samplers_latents_are_the_pipelines(stock, steps, guidance):
    pipeline, folder = stock
    denoiser = loading.load(folder)
    cond = conditioned(denoiser, PROMPTS)
    ours = samplers.sample(denoiser, latents(3), steps, guidance=guidance, **cond)
    stock_scheduler = pipeline.scheduler
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        stock_scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    theirs = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance, latents=latents(3), output_type="latent",
    ).images  # fmt: skip
    pipeline.scheduler = stock_scheduler
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_the_pipelines(stock, phi):
    """Its guidance_rescale; 0 there is the plain kind here."""
    pipeline, folder = stock
    denoiser = loading.load(folder)
    cond = conditioned(denoiser, PROMPTS)
    set_kind(denoiser, rescale=phi)
    ours = samplers.sample(denoiser, latents(3), 4, guidance=5.0, **cond)
    stock_scheduler = pipeline.scheduler
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        stock_scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    theirs, plain = (
        pipeline(
            PROMPTS, num_inference_steps=4, guidance_scale=5.0, latents=latents(3), output_type="latent",
            guidance_rescale=share,
        ).images
        for share in (phi, 0.0)
    )  # fmt: skip
    pipeline.scheduler = stock_scheduler
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    assert (phi > 0) == bool((theirs - plain).abs().max() > 1e-2 * plain.abs().max())


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_opens_in_stock_at_default_arguments(stock, tmp_path, sampler, steps):
    """Whatever guidance and negative prompt say."""
    _, folder = stock
    student = loading.load(folder)
    student.steps, student.sampler, student.clip = steps, sampler, None
    saving.save(student, tmp_path / "student")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    theirs = pipeline(
        PROMPTS, num_inference_steps=steps, generator=generators, output_type="latent", height=32, width=32,
        negative_prompt=["ugly"] * 3,
    ).images  # fmt: skip
    again = loading.load(tmp_path / "student")
    generators = [torch.Generator().manual_seed(i) for i in range(3)]

    def fresh(x):
        return samplers.randn(x.shape, generators, x)

    first = fresh(torch.empty(3, 4, 8, 8))
    ours = samplers.sample(again, first, steps, sampler, fresh=fresh, **conditioned(again, PROMPTS))
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    images = pipeline(PROMPTS, num_inference_steps=steps, latents=first, output_type="np").images
    decoded = again.codec.decode(pipeline(
        PROMPTS, num_inference_steps=steps, latents=first, output_type="latent").images
    )  # fmt: skip
    if sampler == "ddim":
        shades = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(shades - images).max() < 1e-5


def test_a_student_opens_in_bfloat16_at_default_arguments(stock, tmp_path):
    """Its guidance embedding of zeros is there: the plain network unguided, to the bit."""
    student = loading.load(stock[1])
    student.steps, student.clip = 2, None
    saving.save(student, tmp_path / "student")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student", safety_checker=None)
    pipeline.to(torch.bfloat16).set_progress_bar_config(disable=True)
    first = {"num_inference_steps": 2, "latents": latents(3).bfloat16(), "output_type": "latent"}
    theirs = pipeline(PROMPTS, negative_prompt=["ugly"] * 3, **first).images
    assert theirs.dtype == torch.bfloat16 and pipeline.unet.config.time_cond_proj_dim is not None
    guidance_input.detach(pipeline.unet)
    assert torch.equal(theirs, pipeline(PROMPTS, guidance_scale=1.0, **first).images)
    assert (theirs - pipeline(PROMPTS, **first).images).abs().max() > 0.01


@pytest.mark.parametrize("xl", [False, True])
def test_a_scheduler_that_clips_clips_where_its_pipeline_lets_it(tmp_path, xl):
    """SDXL's does; the constructor of Stable Diffusion's turns that off, and says so."""
    noise = text_to_image.scheduler("v_prediction").config
    made = text_to_image.pipeline(tmp_path / "parts", xl=xl, noise=diffusers.DDIMScheduler.from_config(
        noise, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    ))  # fmt: skip
    made.save_pretrained(tmp_path / "teacher", safe_serialization=True)
    changed(tmp_path / "teacher", "scheduler/scheduler_config.json", clip_sample=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        clipping = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "teacher", safety_checker=None)
    clipping.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "latents": latents(3),
        "output_type": "latent",
    }
    theirs, plain = (one(PROMPTS, **options).images for one in (clipping, made))
    denoiser = loading.load(tmp_path / "teacher")
    ours = samplers.sample(denoiser, latents(3), 4, **conditioned(denoiser, PROMPTS))
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    assert ((theirs - plain).abs().max() > 0.3) == xl and (denoiser.clip is not None) == xl


def test_a_teacher_is_saved_as_it_was(stock, tmp_path):
    """No guidance embedding; every other component byte by byte."""
    _, folder = stock
    saving.save(loading.load(folder), tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", safety_checker=None)
    assert again.unet.config.time_cond_proj_dim is None
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and relative.parts[0] not in ("unet", "scheduler", "model_index.json"):
            one, other = (tmp_path / "again" / relative).read_bytes(), path.read_bytes()
            assert one == other or (path.name == "config.json" and json.loads(one) == json.loads(other))


def test_what_is_cached_of_a_model_is_good_for_its_copies_and_students(stock, tmp_path):
    """Configs say where they came from, which makes no other encoder; their numbers do."""
    denoiser = loading.load(stock[1])
    type(stock[0]).from_pretrained(stock[1]).save_pretrained(tmp_path / "copy")
    student = loading.load(stock[1])
    student.steps, student.clip = 4, None
    saving.save(student, tmp_path / "student")
    for place in ("copy", "student"):
        again = loading.load(tmp_path / place)
        assert again.codec.key == denoiser.codec.key
        assert again.conditioner.key == denoiser.conditioner.key
    changed(tmp_path / "copy", "vae/config.json", scaling_factor=0.5)
    changed(tmp_path / "copy", "text_encoder/config.json", hidden_act="gelu")
    other = loading.load(tmp_path / "copy")
    assert other.codec.key != denoiser.codec.key and other.conditioner.key != denoiser.conditioner.key


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_the_codec_is_the_pipelines_autoencoder(tmp_path, kind):
    pipeline = text_to_image.pipeline(tmp_path / "parts", tiny_vae=kind == "AutoencoderTiny")
    pipeline.save_pretrained(tmp_path / "model", safe_serialization=True)
    codec = loading.load(tmp_path / "model").codec
    assert codec.shape(32, 48) == ((4, 8, 12) if kind == "AutoencoderKL" else (4, 8, 12))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = codec.moments(images)
    encoded = pipeline.vae.encode(images)
    scale = pipeline.vae.config.scaling_factor
    expected = encoded.latent_dist.mean if kind == "AutoencoderKL" else encoded.latents
    assert torch.allclose(mean, expected * scale, atol=1e-6)
    assert (std > 0).all() if kind == "AutoencoderKL" else not std.any()
    decoded = pipeline.vae.decode(mean / scale).sample
    assert torch.allclose(codec.decode(mean), decoded, atol=1e-5)
    codec.close()
    assert torch.allclose(codec.decode(mean), decoded, atol=1e-5)


def test_the_codec_takes_as_many_images_at_once_as_fit_into_memory(tmp_path, monkeypatch):
    pipeline = text_to_image.pipeline(tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "model", safe_serialization=True)
    codec = loading.load(tmp_path / "model").codec
    images = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = []
    for network in (codec.network.encoder, codec.network.decoder):
        network.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    (mean, std), decoded = codec.moments(images), codec.decode(images[:, :1, :4, :6].expand(-1, 4, -1, -1))
    assert seen == [5, 5]
    monkeypatch.setattr(codecs, "AT_ONCE", 2 * 32 * 48 + 1)
    again = codec.moments(images)
    assert torch.allclose(again[0], mean, atol=1e-6) and torch.allclose(again[1], std, atol=1e-6)
    again = codec.decode(images[:, :1, :4, :6].expand(-1, 4, -1, -1))
    assert decoded.shape == (5, 3, 16, 24) and torch.allclose(again, decoded, atol=1e-5)
    assert seen == [5, 5, 2, 2, 1, 5]  # latents of 4x6 are images of 16x24
    monkeypatch.setattr(codecs, "AT_ONCE", 1)
    codec.decode(mean)
    assert seen[6:] == [1] * 5


def test_large_images_go_through_in_tiles_and_all_others_whole(tmp_path, monkeypatch):
    """As stock's tiles, encoded and decoded; after a large one a smaller one is whole again."""
    pipeline = text_to_image.pipeline(tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "model", safe_serialization=True)
    codec, vae = loading.load(tmp_path / "model").codec, pipeline.vae
    monkeypatch.setattr(codecs, "LARGEST_WHOLE", 64)
    rng = torch.Generator().manual_seed(0)
    for height, width, tiled in ((64, 96, True), (48, 64, False), (64, 96, True)):  # stock's tiles are of 32
        images = torch.rand(2, 3, height, width, generator=rng) * 2 - 1
        found = {}
        for how in (vae.disable_tiling, vae.enable_tiling):
            how()
            with torch.no_grad():
                of = vae.encode(images).latent_dist
                found[vae.use_tiling] = of.mean, of.std, vae.decode(of.mean).sample
        mean, std, decoded = found[tiled]
        scale = vae.config.scaling_factor
        ours = codec.moments(images)
        assert torch.allclose(ours[0], mean * scale, atol=1e-6)
        assert torch.allclose(ours[1], std * scale, atol=1e-6)
        assert torch.allclose(codec.decode(mean * scale), decoded, atol=1e-5)
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(*found.values(), strict=True))


@pytest.mark.parametrize("xl", [False, True])
def test_latents_are_normalised_where_the_pipeline_does_it(tmp_path, xl):
    """Only SDXL's goes by the means of an autoencoder's config. Latents of one are none of the other's."""
    pipeline = text_to_image.pipeline(tmp_path / "parts", xl=xl)
    pipeline.vae.register_to_config(latents_mean=[1.0, 0.5, 0.0, -1.0], latents_std=[3.0] * 4)
    pipeline.save_pretrained(tmp_path / "model", safe_serialization=True)
    codec = loading.load(tmp_path / "model").codec
    x0 = latents(2)
    size = {"height": 32, "width": 32}
    options = {"num_inference_steps": 2, "num_images_per_prompt": 2, "latents": x0, **size}
    last = pipeline("a ring", output_type="latent", **options).images
    images = torch.from_numpy(pipeline("a ring", output_type="np", **options).images).permute(0, 3, 1, 2)
    assert torch.allclose((codec.decode(last) / 2 + 0.5).clamp(0, 1), images, atol=1e-5)
    assert codec.key.endswith("scaled") != xl


@pytest.mark.parametrize("how", ["variant", "only variant", "shards"])
def test_students_of_variants_and_shards_open_without_naming_them(tmp_path, how):
    """Their components lie under the plain names, each weight once."""
    made = text_to_image.pipeline(tmp_path / "parts", prediction="v_prediction")
    options = {"max_shard_size": "20KB"} if how == "shards" else {"variant": "fp16"}
    made.to(torch.float16 if "variant" in how else torch.float32)
    made.save_pretrained(tmp_path / "teacher", safe_serialization=True, **options)
    if how == "variant":
        text_to_image.pipeline(tmp_path / "parts", prediction="v_prediction", seed=1).save_pretrained(
            tmp_path / "teacher", safe_serialization=True
        )
    student = loading.load(tmp_path / "teacher", variant="fp16" if how == "variant" else None)
    student.steps = 2
    saving.save(student, tmp_path / "student")
    names = {path.name for path in (tmp_path / "student").rglob("*.safetensors*")}
    assert not any("fp16" in name for name in names) or how == "shards"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPTS, num_inference_steps=2, latents=latents(3), output_type="latent").images
    again = loading.load(tmp_path / "student")
    ours = samplers.sample(again, latents(3), 2, **conditioned(again, PROMPTS))
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    first = loading.load(tmp_path / "teacher", variant="fp16" if how == "variant" else None)
    one, other = (each.conditioner.embed(PROMPTS)["encoder_hidden_states"] for each in (first, again))
    assert torch.equal(one, other) and pipeline.text_encoder.dtype == torch.float32


@pytest.mark.parametrize(
    ("path", "values", "says"),
    [
        ("model_index.json", {"../secret": ["diffusers", "X"]}, "component '../secret'"),
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "component 'controlnet'"),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "autoencoder of type.*VQModel"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder of"),
        ("model_index.json", {"tokenizer": ["own", "Tokenizer"]}, "tokenizer of"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "supported is UNet2DConditionModel"),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "StableDiffusionInpaintPip"),
        ("model_index.json", {"unet": [None, None]}, "network of type.*None"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor 0"),
        ("text_encoder/config.json", {"hidden_size": -1}, "hidden_size -1"),
        ("text_encoder/config.json", {"vocab_size": 1 << 20, "hidden_size": 1 << 12}, "much larger"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type 't5'"),
    ],
)
def test_what_is_refused(stock, tmp_path, path, values, says):
    folder = tmp_path / "model"
    shutil.copytree(stock[1], folder)
    changed(folder, path, **values)
    with pytest.raises(UserError, match=says):
        loading.load(folder)


def test_an_autoencoder_of_another_model_is_refused(tmp_path):
    made = text_to_image.pipeline(tmp_path / "parts")
    made.register_modules(vae=diffusers.AutoencoderKL.from_config(made.vae.config, latent_channels=8))
    made.save_pretrained(tmp_path / "model", safe_serialization=True)
    with pytest.raises(
        UserError, match="autoencoder of 8 channels, and its network takes 4; are they of one"
    ):
        loading.load(tmp_path / "model")


@pytest.mark.parametrize(("channels", "says"), [(9, "an inpainting pipeline"), (8, "an image-editing")])
def test_networks_of_other_pipelines_are_said_by_name(tmp_path, channels, says):
    made = text_to_image.pipeline(tmp_path / "parts", in_channels=channels)
    made.save_pretrained(tmp_path / "model", safe_serialization=True)
    with pytest.raises(UserError, match=says):
        loading.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("tokenizer/*", "no tokenizer"),
        ("vae/*.safetensors", "no safetensors weights"),
        ("vae", "no folder vae"),
    ],
)
def test_what_is_missing(stock, tmp_path, lost, says):
    folder = tmp_path / "model"
    shutil.copytree(stock[1], folder)
    for path in folder.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=says):
        loading.load(folder)


def test_a_network_alone_is_refused(stock):
    with pytest.raises(UserError, match="without its text encoder"):
        loading.load(stock[1] / "unet")


@pytest.mark.parametrize("steps", [1, 4])
def test_a_teacher_that_reaches_pure_noise(tmp_path, steps):
    """As Stable Diffusion 2.1 with v-prediction and rescaled betas (Lin et al. 2023), guided."""
    made = text_to_image.pipeline(tmp_path / "parts", prediction="v_prediction")
    made.scheduler = diffusers.DDIMScheduler.from_config(
        made.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
        set_alpha_to_one=True,
    )  # fmt: skip
    made.save_pretrained(tmp_path / "teacher", safe_serialization=True)
    denoiser = loading.load(tmp_path / "teacher")
    assert denoiser.schedule.zero_terminal_snr
    ours = samplers.sample(denoiser, latents(3), steps, guidance=5.0, **conditioned(denoiser, PROMPTS))
    theirs = made(
        PROMPTS, num_inference_steps=steps, guidance_scale=5.0, latents=latents(3), output_type="latent"
    ).images
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


def test_a_network_that_takes_the_weight_is_called_through_what_processes_wrap_around_it(stock):
    """Which passes on the call, and not the config."""

    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **options):
            return self.module(*args, **options)

    denoiser = loading.load(stock[1])
    guidance_input.attach(denoiser.network, 16)
    torch.nn.init.normal_(denoiser.network.time_embedding.cond_proj.weight)
    denoiser.guidance_range = (1.0, 9.0)
    cond = {**conditioned(denoiser, PROMPTS), "guidance_scale": torch.tensor([1.0, 4.0, 9.0])}
    bare = denoiser(latents(3), 0.5, **cond)
    denoiser.network = Wrapped(denoiser.network)
    assert torch.equal(denoiser(latents(3), 0.5, **cond), bare)
    other = denoiser(latents(3), 0.5, **{**cond, "guidance_scale": torch.full((3,), 2.0)})
    assert (other - bare).abs().max() > 1e-4


@pytest.mark.parametrize("weight", [1.0, 6.0])
def test_a_weight_that_is_an_input_is_baked_in(stock, weight):
    """The same outputs of a network without an input; stock draws the student at its default arguments."""
    taking = loading.load(stock[1])
    guidance_input.attach(taking.network, 16)
    torch.nn.init.normal_(taking.network.time_embedding.cond_proj.weight, std=0.2)
    taking.guidance_range = (1.0, 9.0)
    cond = conditioned(taking, PROMPTS)
    with torch.no_grad():
        wanted, other = (taking(latents(3), 0.5, **cond, **taking.guided_by(w, 3)) for w in (weight, 3.0))
        guidance_input.fold(taking, weight)
        found = taking(latents(3), 0.5, **cond)
    assert (wanted - other).abs().max() > 1e-3 and torch.allclose(found, wanted, atol=1e-5)
    assert (taking.guidance_range, taking.guidance_baked_in) == (None, weight)
    assert taking.network.config.time_cond_proj_dim is None
