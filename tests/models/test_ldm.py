"""Unconditional latent diffusion: the stock pipeline's loop; students that open in it; what is refused."""

from __future__ import annotations

import shutil

import diffusers
import numpy as np
import pytest
import torch

from diffkd.core import samplers
from diffkd.errors import UserError
from diffkd.models import loading, saving, students
from diffkd.models.students.config import DropBlocks, Narrow
from tests import edm, ldm
from tests.edits import changed

TRAILING = {"timestep_spacing": "trailing", "set_alpha_to_one": True}


def stock_call(pipeline, steps):
    """Latents, scaled, and images (B, H, W, C) of the pipeline's own call."""
    pipeline.set_progress_bar_config(disable=True)
    given, decode = [], pipeline.vqvae.decode

    def decoding(z, *args, **more):
        given.append(z)
        return decode(z, *args, **more)

    pipeline.vqvae.decode = decoding
    images = pipeline(3, generator=edm.generators(), num_inference_steps=steps, output_type="np").images
    del pipeline.vqvae.decode
    return given[0] * pipeline.vqvae.config.scaling_factor, images


def on_its_grid(pipeline):
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **TRAILING)
    return pipeline


def assert_close(ours, theirs):
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


def shades(codec, latents):
    """As the pipeline makes images of what it decodes."""
    return (codec.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(**options) -> a pipeline and the folder that it was saved to, once for the same options."""
    made = {}

    def get(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("ldm")
            pipeline = ldm.pipeline(**options)
            pipeline.save_pretrained(folder, safe_serialization=True)
            made[key] = pipeline, folder
        return made[key]

    return get


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_samplers_latents_are_the_pipelines(saved, prediction, steps):
    pipeline, folder = saved(prediction=prediction)
    denoiser = loading.load(folder)
    assert (denoiser.num_classes, denoiser.conditioner, denoiser.shape) == (None, None, (3, 8, 8))
    with torch.no_grad():
        ours = samplers.sample(denoiser, edm.noise(), steps)
    theirs, _ = stock_call(on_its_grid(pipeline), steps)
    assert_close(ours, theirs)


def test_a_bound_on_latents_is_kept(tmp_path):
    """The pipeline takes its scheduler as it is."""
    pipeline = ldm.pipeline(noise=ldm.scheduler(clip_sample=True))
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    with torch.no_grad():
        ours = samplers.sample(denoiser := loading.load(tmp_path), edm.noise(), 4)
    assert denoiser.clip == 1.0
    assert_close(ours, stock_call(on_its_grid(pipeline), 4)[0])


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_student_opens_in_stock(saved, tmp_path, prediction, sampler, steps):
    """The pipeline hands its scheduler no generator: the fresh noise of renoise is of the global one."""
    _, folder = saved(prediction=prediction)
    student = loading.load(folder)
    student.steps, student.sampler, student.clip = steps, sampler, None
    saving.save(student, tmp_path / "student")
    assert saving.stock_call(student) == {} and saving.has_global_noise(student)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert type(pipeline).__name__ == "LDMPipeline"
    with torch.random.fork_rng():
        torch.manual_seed(11)
        theirs, images = stock_call(pipeline, steps)
    again, rng = loading.load(tmp_path / "student"), torch.Generator().manual_seed(11)
    with torch.no_grad():
        ours = samplers.sample(
            again, edm.noise(), steps, sampler, fresh=lambda x: torch.randn(x.shape, generator=rng)
        )
    assert_close(ours, theirs)
    assert images.std() > 0.05 and np.abs(shades(again.codec, theirs) - images).max() <= 1 / 255
    assert (again.steps, again.sampler) == (None, sampler)  # it has no card


@pytest.mark.parametrize("kind", ["as many", "fewer"])
def test_the_codec_is_the_pipelines_autoencoder(tmp_path, kind):
    """Latents are those before they are quantised, as wide as the codes; what is decoded is quantised."""
    vqvae = ldm.autoencoder(**({} if kind == "as many" else {"latent_channels": 4, "vq_embed_dim": 3}))
    ldm.pipeline(vqvae=vqvae).save_pretrained(tmp_path, safe_serialization=True)
    changed(
        tmp_path, "vqvae/config.json", latents_mean=[1.0] * 3, latents_std=[3.0] * 3
    )  # of other pipelines
    codec = loading.load(tmp_path).codec
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        encoded = vqvae.encode(images).latents
        mean, std = codec.moments(images)
        quantised = vqvae.decode(encoded).sample
        plain = vqvae.decode(encoded, force_not_quantize=True).sample
    assert torch.allclose(mean, encoded * 0.7, atol=1e-6) and not std.any()
    decoded = codec.decode(mean)
    assert torch.allclose(decoded, quantised, atol=1e-5) and (decoded - plain).abs().max() > 0.1
    assert (codec.shape(16, 16), codec.factor) == ((3, 8, 8), 2)
    with pytest.raises(UserError, match="images of 32x16 are not of the one size.*use 16x16"):
        codec.shape(16, 32)


def test_a_teacher_is_saved_as_it_was(saved, tmp_path):
    """The autoencoder byte by byte, weights equal."""
    pipeline, folder = saved()
    saving.save(loading.load(folder), tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    for key, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, again.unet.state_dict()[key])
    for path in (folder / "vqvae").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "vqvae" / path.name).read_bytes()


@pytest.mark.parametrize(
    "student",
    [Narrow(kind="narrow", ratio=0.5), DropBlocks(kind="drop_blocks", blocks=["mid_block"])],
    ids=["narrow", "drop_blocks"],
)
def test_smaller_students_are_pipelines_too(saved, tmp_path, student):
    _, folder = saved(prediction="v_prediction")
    teacher = loading.load(folder)
    made = student.build(teacher, 0)
    made.steps = 2
    saving.save(made, tmp_path / "student")
    count = sum(p.numel() for p in teacher.network.parameters())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert type(pipeline).__name__ == "LDMPipeline" and pipeline.unet.num_parameters() < count
    theirs, _ = stock_call(pipeline, 2)
    with torch.no_grad():
        assert_close(samplers.sample(made, edm.noise(), 2), theirs)


def test_a_teacher_in_half_precision_has_students_in_float32(tmp_path):
    """Stock draws noise in float32, and fails with a network that is not."""
    pipeline = ldm.pipeline(prediction="v_prediction")
    pipeline.to(torch.float16).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    with pytest.raises(RuntimeError):
        stock_call(pipeline, 1)
    student = loading.load(tmp_path / "teacher")
    student.steps = 2
    saving.save(student, tmp_path / "student")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert again.vqvae.dtype == again.unet.dtype == torch.float32
    with torch.no_grad():
        assert_close(samplers.sample(student, edm.noise(), 2), stock_call(again, 2)[0])
    with pytest.raises(UserError, match=r"float32, which a network in torch.float16 does not take; save in"):
        saving.save(student.to(dtype=torch.float16), tmp_path / "half")


def test_a_network_alone_is_one_of_pixels(saved, tmp_path):
    """As nothing in its folder says otherwise; its students are a pipeline of pixels."""
    student = students.copy_of(loading.load(saved()[1] / "unet"))
    assert student.codec is None
    saving.save(student, tmp_path)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)).__name__ == "DDIMPipeline"


# what is refused


@pytest.mark.parametrize(
    ("path", "values", "says"),
    [
        ("model_index.json", {"safety_checker": ["x", "Y"]}, "component 'safety_checker'"),
        ("model_index.json", {"vqvae": ["diffusers", "AutoencoderKL"]}, "type.*AutoencoderKL.*use VQModel"),
        ("model_index.json", {"vqvae": [None, None]}, "autoencoder of type .*None"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "supported is UNet2DModel"),
        ("unet/config.json", {"sample_size": None}, "sample_size None, .* latents of one side"),
        ("unet/config.json", {"sample_size": [8, 8]}, r"sample_size \[8, 8\], .* latents of one side"),
        ("unet/config.json", {"sample_size": 0}, "sample_size 0, .* latents of one side"),
        ("unet/config.json", {"num_class_embeds": 4}, "num_class_embeds 4, which is not supported"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type 'timestep', which is not"),
        ("vqvae/config.json", {"scaling_factor": 0}, "scaling_factor 0"),
        ("vqvae/config.json", {"vq_embed_dim": 4}, "config in .*vqvae has .* parameters and the weights are"),
        ("vqvae/config.json", {"num_vq_embeddings": 9}, "weights in .*vqvae are .* more than its config"),
        ("scheduler/scheduler_config.json", {"prediction_type": "score"}, "prediction_type 'score'"),
        ("diffkd.json", {"num_classes": 9}, "num_classes 9, and the network has no class embeddings"),
    ],
    ids=str,
)
def test_what_is_refused(saved, tmp_path, path, values, says):
    shutil.copytree(saved()[1], folder := tmp_path / "model")
    (folder / "diffkd.json").write_text("{}")
    changed(folder, path, **values)
    with pytest.raises(UserError, match=says) as refused:
        loading.load(folder)
    assert "\n" not in str(refused.value)


def test_latents_of_other_channels(tmp_path):
    ldm.pipeline(vqvae=ldm.autoencoder(vq_embed_dim=4)).save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(UserError, match="autoencoder of 4 channels, and its network takes 3"):
        loading.load(tmp_path)


@pytest.mark.parametrize(
    ("lost", "says"),
    [("vqvae", "no folder vqvae"), ("unet/*.saf*", "no safetensors"), ("vqvae/*.saf*", "no safetensors")],
)
def test_what_is_missing(saved, tmp_path, lost, says):
    shutil.copytree(saved()[1], folder := tmp_path / "model")
    for path in folder.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=says):
        loading.load(folder)


def test_a_codec_of_no_pipeline_is_refused(saved, tmp_path):
    student = loading.load(saved()[1])
    student.codec = object()
    with pytest.raises(UserError, match="saved with the autoencoder of its teacher"):
        saving.save(student, tmp_path)
