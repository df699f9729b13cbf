"""DiT: the stock pipeline's loop, guided or not; students that open in it; what is refused."""

from __future__ import annotations

import shutil

import diffusers
import numpy as np
import pytest
import torch

from diffkd.core import interval, samplers
from diffkd.errors import UserError
from diffkd.models import loading, saving, students
from tests import dit
from tests.edits import changed

LABELS = [3, 5, 0]
TRAILING = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}


def noises(count=3, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def latents(count=3):
    return torch.cat([torch.randn(1, 4, dit.SIDE, dit.SIDE, generator=one) for one in noises(count)])


def stock_call(pipeline, steps, **options):
    """Latents, scaled, and images (B, H, W, C) of the pipeline's own call."""
    given, decode = [], pipeline.vae.decode

    def decoding(z, *args, **more):
        given.append(z)
        return decode(z, *args, **more)

    pipeline.vae.decode = decoding
    images = pipeline(
        LABELS, generator=noises(), num_inference_steps=steps, output_type="np", **options
    ).images
    del pipeline.vae.decode
    return given[0] * pipeline.vae.config.scaling_factor, images


def on_its_grid(pipeline):
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **TRAILING)
    return pipeline


def assert_close(ours, theirs):
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(**options) -> a pipeline and the folder that it was saved to, once for the same options."""
    made = {}

    def get(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("dit")
            pipeline = dit.pipeline(**options)
            pipeline.save_pretrained(folder, safe_serialization=True)
            made[key] = pipeline, folder
        return made[key]

    return get


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    ("prediction", "learned"), [("epsilon", True), ("epsilon", False), ("v_prediction", True)]
)
def test_the_samplers_latents_are_the_pipelines(saved, prediction, learned, guidance, steps):
    """With the thousand classes that the pipeline is made for."""
    pipeline, folder = saved(classes=1000, prediction=prediction, learned=learned)
    denoiser = loading.load(folder)
    assert (denoiser.num_classes, denoiser.null_label) == (1000, 1000)
    with torch.no_grad():
        ours = samplers.sample(
            denoiser, latents(), steps, guidance=guidance, class_labels=torch.tensor(LABELS)
        )
    theirs, _ = stock_call(on_its_grid(pipeline), steps, guidance_scale=guidance)
    assert_close(ours, theirs)


@pytest.mark.parametrize("classes", [10, 1004])
def test_guidance_goes_by_the_networks_own_label_for_no_class(saved, classes):
    """Not by 1000, which is no label of a network of ten classes, and a class of one of more: stock is given
    a network whose label 1000 is that one."""
    pipeline, folder = saved(classes=classes)
    denoiser = loading.load(folder)
    assert (denoiser.num_classes, denoiser.null_label) == (classes, classes)
    ours = samplers.sample(denoiser, latents(), 4, guidance=3.0, class_labels=torch.tensor(LABELS)).detach()
    weights = pipeline.transformer.state_dict()
    for name, value in list(weights.items()):
        if name.endswith("embedding_table.weight"):
            table = torch.zeros(1001, value.shape[1])
            table[:10], table[1000] = value[:10], value[classes]
            weights[name] = table
    reference = dit.pipeline(classes=1000)
    reference.transformer.load_state_dict(weights)
    reference.vae = pipeline.vae
    theirs, _ = stock_call(on_its_grid(reference), 4, guidance_scale=3.0)
    assert_close(ours, theirs)


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_student_opens_in_stock(saved, tmp_path, prediction, sampler, steps):
    """The pipeline hands its scheduler no generator: the fresh noise of renoise is of the global one."""
    _, folder = saved(prediction=prediction)
    student = loading.load(folder)
    student.steps, student.sampler, student.clip = steps, sampler, None
    saving.save(student, tmp_path / "student")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "DiTPipeline"
    with torch.random.fork_rng():
        torch.manual_seed(11)
        theirs, images = stock_call(pipeline, steps, **saving.stock_call(student))
    again, rng = loading.load(tmp_path / "student"), torch.Generator().manual_seed(11)
    with torch.no_grad():
        ours = samplers.sample(
            again, latents(), steps, sampler, class_labels=torch.tensor(LABELS),
            fresh=lambda x: torch.randn(x.shape, generator=rng),
        )  # fmt: skip
        assert_close(ours, theirs)
        shades = (again.codec.decode(ours) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert np.abs(shades.numpy() - images).max() <= 1 / 255
    assert (again.steps, again.sampler) == (None, sampler)  # it has no card


def test_a_teacher_is_saved_as_it_was(saved, tmp_path):
    """The autoencoder byte by byte, weights equal, and the index's names of classes."""
    pipeline, source = saved()
    shutil.copytree(source, folder := tmp_path / "teacher")
    changed(folder, "model_index.json", id2label={"0": "tench, Tinca tinca"})
    saving.save(loading.load(folder), tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert again.labels == {"tench": 0, "Tinca tinca": 0}
    for key, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, again.transformer.state_dict()[key])
    for path in (folder / "vae").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "vae" / path.name).read_bytes()


def test_a_network_whose_config_does_not_name_its_output(saved, tmp_path):
    """Stock divides out_channels by two, and so cannot draw the teacher; it can its student."""
    pipeline, folder = saved(learned=False, out_channels=None)
    with pytest.raises(TypeError):
        stock_call(on_its_grid(pipeline), 1, guidance_scale=1.0)
    student = loading.load(folder)
    student.steps = 2
    saving.save(student, tmp_path / "student")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    theirs, _ = stock_call(pipeline, 2, guidance_scale=1.0)
    with torch.no_grad():
        assert_close(samplers.sample(student, latents(), 2, class_labels=torch.tensor(LABELS)), theirs)


@pytest.mark.parametrize("how", ["variant", "only variant", "shards"])
def test_students_of_variants_and_shards_open_without_naming_them(tmp_path, how):
    made = dit.pipeline(prediction="v_prediction")
    options = {"max_shard_size": "20KB"} if how == "shards" else {"variant": "fp16"}
    made.to(torch.float16 if "variant" in how else torch.float32)
    made.save_pretrained(tmp_path / "teacher", safe_serialization=True, **options)
    if how == "variant":
        dit.pipeline(prediction="v_prediction", seed=1).save_pretrained(
            tmp_path / "teacher", safe_serialization=True
        )
    student = loading.load(tmp_path / "teacher", variant="fp16" if how == "variant" else None)
    student.steps = 2
    saving.save(student, tmp_path / "student")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    theirs, images = stock_call(pipeline, 2, guidance_scale=1.0)
    again = loading.load(tmp_path / "student")
    with torch.no_grad():
        ours = samplers.sample(again, latents(), 2, class_labels=torch.tensor(LABELS))
        shades = (again.codec.decode(ours) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert_close(ours, theirs)
    assert np.abs(shades.numpy() - images).max() <= 1 / 255 and pipeline.vae.dtype == torch.float32
    half = made.transformer.float().state_dict()
    for key, value in again.network.state_dict().items():
        assert torch.equal(value, half[key])


def test_the_codec_is_the_pipelines_autoencoder(tmp_path):
    """Which goes by the scaling factor alone, whatever else its config has."""
    vae = dit.autoencoder(latents_mean=[1.0] * 4, latents_std=[3.0] * 4)
    pipeline = dit.pipeline(vae=vae, prediction="v_prediction")
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    denoiser = loading.load(tmp_path)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = pipeline.vae.config.scaling_factor
    encoded = pipeline.vae.encode(images).latent_dist
    mean, std = denoiser.codec.moments(images)
    assert torch.allclose(mean, encoded.mean * scale, atol=1e-6)
    assert torch.allclose(std, encoded.std * scale, atol=1e-6)
    theirs, drawn = stock_call(on_its_grid(pipeline), 4, guidance_scale=1.0)
    shades = (denoiser.codec.decode(theirs) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(shades - drawn).max() < 1e-5
    assert denoiser.codec.shape(32, 32) == (4, 8, 8)
    with pytest.raises(UserError, match="images of 64x32 are not of the one size.*use 32x32"):
        denoiser.codec.shape(32, 64)


def test_no_label_is_dropped_while_a_student_learns(saved):
    """A network in train mode drops a tenth of them at random."""
    student = students.copy_of(loading.load(saved()[1]))
    assert not any(module.training for module in student.modules())
    x, labels = latents(), torch.tensor(LABELS)
    state = torch.get_rng_state()
    first = student(x, 0.5, class_labels=labels)
    assert all(torch.equal(student(x, 0.5, class_labels=labels), first) for _ in range(20))
    assert torch.equal(torch.get_rng_state(), state)


# the length of a step


def telling(folder):
    """A student whose interval embedding says something."""
    student = loading.load(folder)
    interval.attach(student.network)
    generator = torch.Generator().manual_seed(1)
    for parameter in interval.attached(student.network).parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return student


@torch.no_grad()
def told(student, length=None):
    more = {} if length is None else {"interval": torch.full((3,), length, dtype=torch.float64)}
    return student.output(latents(), 0.5, class_labels=torch.tensor(LABELS), **more)


def test_every_block_is_told_the_length_of_a_step(saved):
    """Each embeds the time on its own, and the first one's embedding is asked twice: folded, all know it."""
    _, folder = saved(prediction="v_prediction")
    student, plain = telling(folder), told(loading.load(folder))
    assert torch.equal(told(student), plain)
    quarter = told(student, 0.25)
    assert (quarter - told(student, 1.0)).abs().max() > 1e-2 < (quarter - plain).abs().max()
    network = interval.folded(student.network, 0.25)
    stock = loading.load(folder).network.state_dict()
    changed = [key for key, value in network.state_dict().items() if not torch.equal(value, stock[key])]
    assert changed == [f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2.bias" for i in range(3)]
    folded = students.with_network(loading.load(folder), network)
    assert torch.allclose(told(folded), quarter, atol=1e-5)


def test_blocks_that_are_computed_again_would_not_know_it(saved):
    student = telling(saved()[1])
    with pytest.raises(UserError, match="gradient_checkpointing does not work for a DiTTransformer2DModel"):
        interval.check_recomputed(student.network)
    interval.check_recomputed(loading.load(saved()[1]).network)


# what is refused


@pytest.mark.parametrize(
    ("path", "values", "says"),
    [
        ("model_index.json", {"safety_checker": ["x", "Y"]}, "component 'safety_checker'"),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "autoencoder of type.*VQModel"),
        ("model_index.json", {"transformer": ["diffusers", "SD3Transformer2DModel"]}, "SD3Transformer2DMod"),
        ("model_index.json", {"transformer": [None, None]}, "network of type.*None"),
        ("transformer/config.json", {"norm_type": "layer_norm"}, "norm_type 'layer_norm'"),
        ("transformer/config.json", {"num_embeds_ada_norm": None}, "num_embeds_ada_norm None"),
        (
            "transformer/config.json",
            {"num_embeds_ada_norm": 12},
            "num_embeds_ada_norm 12, and its weights embed 10 classes and none",
        ),
        ("transformer/config.json", {"out_channels": 6}, "in_channels 4 and out_channels 6"),
        ("transformer/config.json", {"in_channels": [4]}, "in_channels"),
        ("transformer/config.json", {"sample_size": [8, 8]}, "sample_size.*positive integer"),
        ("transformer/config.json", {"sample_size": 9}, "does not divide by its patch_size 2"),
        ("transformer/config.json", {"sample_size": 5000}, "which are 6,250,000 tokens; supported are up to"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor 0"),
        ("vae/config.json", {"out_channels": None}, "vae cannot be read .*NoneType"),
        ("vae/config.json", {"act_fn": 7}, "vae cannot be read"),
        ("diffkd.json", {"num_classes": 9}, "num_classes 9.*num_embeds_ada_norm 10"),
        ("diffkd.json", {"null_label": 3}, "null_label 3.*num_embeds_ada_norm 10"),
        ("diffkd.json", {"call": {"guidance_scale": "x"}}, "call .* not numbers or booleans by name"),
        ("model_index.json", {"_class_name": "HunyuanDiTPipeline"}, "DiTPipeline, .* nearest"),
        ("model_index.json", {"_class_name": "DitPipeline"}, "the nearest DiTPipeline"),
    ],
)
def test_what_is_refused(saved, tmp_path, path, values, says):
    shutil.copytree(saved()[1], folder := tmp_path / "model")
    (folder / "diffkd.json").write_text("{}")
    changed(folder, path, **values)
    with pytest.raises(UserError, match=says) as refused:
        loading.load(folder)
    assert "\n" not in str(refused.value)


def test_latents_of_other_channels(tmp_path):
    vae = dit.autoencoder(latent_channels=8)
    dit.pipeline(vae=vae).save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(UserError, match="autoencoder of 8 channels, and its network takes 4"):
        loading.load(tmp_path)


@pytest.mark.parametrize(
    ("lost", "says"), [("vae", "no folder vae"), ("transformer/*.saf*", "no safetensors")]
)
def test_what_is_missing(saved, tmp_path, lost, says):
    shutil.copytree(saved()[1], folder := tmp_path / "model")
    for path in folder.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=says):
        loading.load(folder)


def test_a_network_alone_is_refused(saved):
    with pytest.raises(UserError, match="alone, without its autoencoder"):
        loading.load(saved()[1] / "transformer")


def test_its_name_of_earlier_versions_is_known(saved, tmp_path):
    """facebook/DiT-XL-2-256 has it in its index and its config, with fields that say nothing."""
    pipeline, source = saved()
    shutil.copytree(source, folder := tmp_path / "model")
    changed(folder, "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    changed(
        folder, "transformer/config.json", _class_name="Transformer2DModel", cross_attention_dim=None,
        num_vector_embeds=None, only_cross_attention=False, use_linear_projection=False,
    )  # fmt: skip
    denoiser = loading.load(folder)
    for key, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, denoiser.network.state_dict()[key])
    saving.save(denoiser, tmp_path / "again")
    assert type(diffusers.DiTPipeline.from_pretrained(tmp_path / "again").transformer) is type(
        pipeline.transformer
    )


def test_the_label_for_no_class_is_the_networks_own(saved):
    denoiser = loading.load(saved()[1])
    loading.set_null_label(denoiser, 10)
    with pytest.raises(UserError, match="null_label 9 is not that of this model, which is 10"):
        loading.set_null_label(denoiser, 9)
