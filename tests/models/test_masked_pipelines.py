"""PixArt, SANA, Lumina 2, Z-Image, Qwen-Image: the stock pipelines' prompts, latents and images; students
that open in them; what is refused."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch

from diffkd.core import samplers
from diffkd.core.flow_schedule import Shift
from diffkd.errors import UserError
from diffkd.models import loading, packing, saving, students
from diffkd.runs.reports import model_card
from tests import masked_pipelines
from tests.edits import changed
from tests.masked_pipelines import CHANNELS, KINDS, PIXELS, SIDE, WIDTH

PROMPTS = ["A red Cat ", "two dogs, a house", ""]
TOKENS = {
    "pixart_alpha": 120, "pixart_sigma": 300, "sana": 300, "lumina2": 256, "z_image": 512, "qwen_image": 512,
}  # fmt: skip
CALLS = {  # of a student whose size is not its pipeline's default
    "pixart_alpha": {"guidance_scale": 1.0, "clean_caption": False, "use_resolution_binning": False},
    "pixart_sigma": {"guidance_scale": 1.0, "clean_caption": False, "use_resolution_binning": False},
    "sana": {"guidance_scale": 1.0, "use_resolution_binning": False, "height": 32, "width": 32},
    "lumina2": {"guidance_scale": 1.0},
    "z_image": {"guidance_scale": 0.0, "height": 32, "width": 32},
    "qwen_image": {"height": 32, "width": 32},
}  # fmt: skip
FLOWS = [kind for kind in KINDS if not kind.startswith("pixart")]


def generators(count=3):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def latents(count=3):
    shape = 1, CHANNELS, SIDE, SIDE
    return torch.cat([torch.randn(shape, generator=one) for one in generators(count)])


def conditioned(denoiser, prompts=PROMPTS):
    denoiser.set_null(denoiser.conditioner.null())
    return denoiser.conditioner.embed(prompts)


def assert_close(ours, theirs):
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


def unpacked(kind, drawn):
    return packing.unpack(drawn, SIDE, SIDE) if kind == "qwen_image" else drawn


def called(kind, weight, steps):
    """Arguments of a pipeline's call for this weight, on the grid of diffkd's samplers."""
    call = {**CALLS[kind], "num_inference_steps": steps, "output_type": "latent"}
    if kind == "sana":
        call["sigmas"] = [1 - i / steps for i in range(steps)]
    if kind == "qwen_image":
        return call if weight == 1 else {**call, "true_cfg_scale": weight, "negative_prompt": [" "] * 3}
    return {**call, "guidance_scale": weight - 1 if kind == "z_image" else weight}


def on_its_grid(kind, pipeline):
    """With a scheduler that steps as diffkd's samplers do, when it is called as above."""
    config = pipeline.scheduler.config
    if kind.startswith("pixart"):
        options = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, **options)
    elif kind == "sana":
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    elif kind == "qwen_image":  # whose stretch to a last sigma depends on the number of steps
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, shift_terminal=None)
    return pipeline


@pytest.fixture(scope="module", params=KINDS)
def stock(request, tmp_path_factory):
    """Kind, pipeline, and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    made = masked_pipelines.pipeline(folder / "parts", request.param)
    masked_pipelines.save(made, request.param, folder / "teacher")
    return request.param, made, folder / "teacher"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind) -> the folder of its pipeline."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            masked_pipelines.save(masked_pipelines.pipeline(folder / "parts", kind), kind, folder / "teacher")
            made[kind] = folder / "teacher"
        return made[kind]

    return get


def of_stock(kind, pipeline, prompts, negative):
    """Embeddings and masks of the pipeline's own encode_prompt: of prompts, and of negative ones, padded."""
    if kind == "qwen_image":
        found = [*pipeline.encode_prompt(prompts), *pipeline.encode_prompt(negative)]
        ones = [torch.ones(found[i].shape[:2]) if found[i + 1] is None else found[i + 1] for i in (0, 2)]
        pairs = [(found[0], ones[0]), (found[2], ones[1])]
    elif kind == "z_image":
        lists = pipeline.encode_prompt([*prompts], negative_prompt=[*negative])
        pairs = [
            (torch.nn.utils.rnn.pad_sequence(one, batch_first=True), torch.stack(
                [torch.arange(max(map(len, one))) < len(row) for row in one]
            )) for one in lists
        ]  # fmt: skip
    else:
        told = {"complex_human_instruction": masked_pipelines.sana_instruction()} if kind == "sana" else {}
        found = pipeline.encode_prompt(prompts, negative_prompt=negative, **told)
        pairs = [found[:2], found[2:]]
    length = TOKENS[kind]
    return [
        (torch.nn.functional.pad(states, (0, 0, 0, length - states.shape[1])),
         torch.nn.functional.pad(mask.float(), (0, length - mask.shape[1])))
        for states, mask in pairs
    ]  # fmt: skip


@torch.no_grad()
def test_prompts_are_the_pipelines(stock):
    """Of every length, one too long for it, and negative ones; padding counts where the network sees it."""
    kind, pipeline, folder = stock
    conditioner = loading.load(folder).conditioner
    prompts, negative = [*PROMPTS, "Word " * 200], ["A dog", "", " ", "x"]
    ours = conditioner.embed(prompts)
    nulls = [conditioner.null(one) for one in negative]
    no_prompt = {key: torch.cat([one[key] for one in nulls]) for key in nulls[0]}
    for found, (states, mask) in zip(
        (ours, no_prompt), of_stock(kind, pipeline, prompts, negative), strict=True
    ):
        assert found["encoder_hidden_states"].shape == (4, TOKENS[kind], WIDTH)
        assert (
            torch.equal(found["encoder_attention_mask"], mask) and found["encoder_hidden_states"].std() > 1e-3
        )
        seen = mask.bool() if kind in ("z_image", "qwen_image") else torch.ones_like(mask, dtype=torch.bool)
        assert (found["encoder_hidden_states"][seen] - states[seen]).abs().max() < 2e-6 * max(
            1, states.abs().max()
        )
    blank = conditioner.null(" " if kind == "qwen_image" else "")
    for key, value in conditioner.null().items():
        assert torch.equal(value, blank[key])
    for key, value in conditioner.example.items():
        assert value.shape == ours[key][:1].shape


@torch.no_grad()
def test_the_length_that_a_tokenizer_names_is_not_the_pipelines(stock, tmp_path):
    """Published ones name any; the pipelines give their own."""
    kind, pipeline, source = stock
    shutil.copytree(source, folder := tmp_path / "model")
    changed(folder, "tokenizer/tokenizer_config.json", model_max_length=40)
    ours = loading.load(folder).conditioner.embed(PROMPTS)
    ((states, mask), _) = of_stock(kind, pipeline, PROMPTS, PROMPTS)
    assert torch.equal(ours["encoder_attention_mask"], mask)
    seen = mask.bool()
    assert (ours["encoder_hidden_states"] - states)[seen].abs().max() < 2e-6 * max(1, states.abs().max())


def test_what_is_cut_off_a_prompt_is_told(stock, caplog):
    kind, _, folder = stock
    loading.load(folder).conditioner.embed(["a " * 300])
    assert caplog.text.count("cut off") == 1 and "the prompt 'a a a" in caplog.text
    assert "cut off: 'a a" in caplog.text


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_samplers_latents_are_the_pipelines(stock, steps, guidance):
    kind, pipeline, folder = stock
    denoiser = loading.load(folder)
    assert denoiser.shape == (CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        ours = samplers.sample(denoiser, latents(), steps, guidance=guidance, **conditioned(denoiser))
    call = called(kind, guidance, steps)
    theirs = on_its_grid(kind, pipeline)([*PROMPTS], generator=generators(), **call).images
    assert_close(ours, unpacked(kind, theirs))


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_opens_in_stock(stock, tmp_path, sampler, steps):
    """At its card's arguments: latents, images, and what diffkd reads again. The pipelines that hand their
    scheduler no generator draw the fresh noise of renoise from the global one."""
    kind, _, folder = stock
    student = loading.load(folder)
    student.steps, student.sampler, student.clip = steps, sampler, None
    saving.save(student, tmp_path / "student")
    card = model_card.describe(student)
    model_card.write(tmp_path / "student", card)
    assert card["call"] == CALLS[kind]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    global_noise = kind in ("lumina2", "z_image", "qwen_image")
    assert card.get("global_noise", False) is (global_noise and sampler == "renoise" and steps > 1)

    def drawn(kind_of_output):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return pipeline(
                [*PROMPTS], num_inference_steps=steps, generator=generators(), output_type=kind_of_output,
                **card["call"],
            ).images  # fmt: skip

    again, noises = loading.load(tmp_path / "student"), generators()
    assert (again.steps, again.sampler, again.shape) == (steps, sampler, student.shape)
    shape = 1, CHANNELS, SIDE, SIDE
    first = torch.cat([torch.randn(shape, generator=one) for one in noises])
    rng = torch.Generator().manual_seed(11)
    fresh = (
        (lambda x: fresh_of_tokens(kind, x, rng))
        if global_noise
        else (lambda x: torch.cat([torch.randn(shape, generator=one) for one in noises]))
    )
    with torch.no_grad():
        ours = samplers.sample(again, first, steps, sampler, fresh=fresh, **conditioned(again))
        assert_close(ours, unpacked(kind, drawn("latent")))
        shades = (again.codec.decode(ours) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    images = drawn("np")
    assert images.shape == (3, PIXELS[kind], PIXELS[kind], 3) and images.std() > 0.02
    assert np.abs(shades.numpy() - images).max() <= 1 / 255


def fresh_of_tokens(kind, x, rng):
    """Noise as the scheduler draws it: of packed latents, in the order of their tokens."""
    if kind != "qwen_image":
        return torch.randn(x.shape, generator=rng)
    return packing.unpack(torch.randn(packing.pack(x).shape, generator=rng), SIDE, SIDE)


def test_a_teacher_is_saved_as_it_was(stock, tmp_path):
    """All that is not the network and its scheduler byte by byte, weights equal; the scheduler of a flow."""
    kind, pipeline, folder = stock
    saving.save(loading.load(folder), tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    for key, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, again.transformer.state_dict()[key])
    for part in ("vae", "text_encoder", "tokenizer"):
        paths = [path.name for path in (folder / part).iterdir()]
        assert sorted(path.name for path in (tmp_path / "again" / part).iterdir()) == sorted(paths)
        for name in paths:
            if name.endswith(".safetensors"):
                assert (folder / part / name).read_bytes() == (tmp_path / "again" / part / name).read_bytes()
    if kind in FLOWS:
        wanted = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert json.loads((tmp_path / "again/scheduler/scheduler_config.json").read_text()) == wanted


@torch.no_grad()
def test_the_codec_is_the_pipelines_autoencoder(stock):
    kind, pipeline, folder = stock
    codec, vae = loading.load(folder).codec, pipeline.vae
    side = PIXELS[kind]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = codec.moments(images)
    assert mean.shape == std.shape == (2, CHANNELS, SIDE, SIDE) and codec.shape(side, side) == mean.shape[1:]
    if kind == "qwen_image":
        encoded = vae.encode(images[:, :, None]).latent_dist
        of_mean, of_std = (
            torch.tensor(vae.config[key]).reshape(1, -1, 1, 1) for key in ("latents_mean", "latents_std")
        )
        wanted = (encoded.mean[:, :, 0] - of_mean) / of_std, encoded.std[:, :, 0] / of_std
    elif kind == "sana":
        found = vae.encode(images).latent * vae.config.scaling_factor
        wanted = found, torch.zeros_like(found)
    else:
        encoded, scale = vae.encode(images).latent_dist, vae.config.scaling_factor
        shift = vae.config.shift_factor or 0.0
        wanted = (encoded.mean - shift) * scale, encoded.std * scale
    for ours, theirs in zip((mean, std), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_images_of_other_sizes(stock):
    """What stock draws when it is called with a height and a width."""
    kind, pipeline, folder = stock
    denoiser = loading.load(folder)
    factor = PIXELS[kind] // SIDE
    height, width = (64, 32) if kind == "sana" else (8 * factor, 4 * factor)
    denoiser.fit(shape := denoiser.codec.shape(height, width))
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = samplers.sample(denoiser, noise, 2, **conditioned(denoiser, ["a cat"]))
    call = {**called(kind, 1.0, 2), "height": height, "width": width}
    theirs = on_its_grid(kind, pipeline)(["a cat"], generator=torch.Generator().manual_seed(3), **call).images
    if kind == "qwen_image":
        theirs = packing.unpack(theirs, *shape[1:])
    assert_close(ours, theirs)
    with pytest.raises(UserError, match="do not divide by"):
        denoiser.codec.shape(height + 1, width)


def test_an_alpha_network_that_is_told_the_size(tmp_path):
    """As PixArt-alpha's of 1024 pixels is; it cannot be a Sigma's."""
    made = masked_pipelines.pipeline(tmp_path / "parts", "pixart_alpha", sample_size=128)
    masked_pipelines.save(made, "pixart_alpha", tmp_path / "model")
    denoiser = loading.load(tmp_path / "model")
    assert denoiser.network.use_additional_conditions and denoiser.shape == (CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        ours = samplers.sample(denoiser, latents(), 4, guidance=3.0, **conditioned(denoiser))
    call = {**called("pixart_alpha", 3.0, 4), "height": 32, "width": 32}
    theirs = on_its_grid("pixart_alpha", made)([*PROMPTS], generator=generators(), **call).images
    assert_close(ours, theirs)
    changed(tmp_path / "model", "model_index.json", _class_name="PixArtSigmaPipeline")
    with pytest.raises(UserError, match="is told the image's size .* does not tell it"):
        loading.load(tmp_path / "model")


def test_a_scheduler_that_stretches_its_grid(saved, tmp_path, caplog):
    """Qwen-Image's: its last sigma is left where an even grid has it, and a line says so."""
    denoiser = loading.load(saved("qwen_image"))
    assert "shift_terminal 0.02" in caplog.text
    law = denoiser.schedule.law
    assert isinstance(law, Shift) and law == denoiser.schedule_of((CHANNELS, SIDE, SIDE)).law
    assert denoiser.schedule_of((CHANNELS, 16, 16)).law.shift > law.shift
    denoiser.steps = 4
    saving.save(denoiser, tmp_path / "student")
    config = json.loads((tmp_path / "student/scheduler/scheduler_config.json").read_text())
    assert config["shift_terminal"] is None and config["shift"] == pytest.approx(law.shift)


@pytest.mark.parametrize("template", [None, "{{ 1 / 0 }}", "{% for"])
def test_a_chat_template_that_does_not_work(saved, tmp_path, template):
    shutil.copytree(saved("z_image"), folder := tmp_path / "model")
    file = folder / "tokenizer" / "chat_template.jinja"
    file.unlink() if template is None else file.write_text(template)
    conditioner = loading.load(folder).conditioner
    with pytest.raises(UserError, match="makes no chat of a prompt .* is its chat template there"):
        conditioner.embed(["a cat"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_learns_as_it_is_drawn(saved, kind):
    """Nothing is dropped at random, and gradients reach every weight but those of masked tokens."""
    student = students.copy_of(loading.load(saved(kind)))
    assert not any(module.training for module in student.modules())
    cond = conditioned(student)
    student(latents(), torch.tensor([0.3, 0.6, 1.0]), **cond).square().sum().backward()
    lost = [name for name, weight in student.network.named_parameters() if weight.grad is None]
    without_use = {"qwen_image": "transformer_blocks.1", "z_image": "pad_token"}.get(kind)
    assert all(without_use is not None and without_use in name for name in lost)


REFUSED = [
    ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "autoencoder of type.*VQModel"),
    ("model_index.json", {"transformer": ["diffusers", "SanaVideoTransformer3DModel"]}, "3DModel.*of videos"),
    ("model_index.json", {"text_encoder": ["transformers", "BertModel"]}, "text_encoder of .*BertModel"),
    ("model_index.json", {"tokenizer": ["transformers", "BertTokenizer"]}, "tokenizer of .*BertTokenizer"),
    ("model_index.json", {"image_encoder": ["x", "Y"]}, "component 'image_encoder'"),
    ("text_encoder/config.json", {"model_type": "bert"}, "model_type 'bert'"),
    ("diffkd.json", {"call": {"height": 33}}, "33 do not divide by"),
    ("diffkd.json", {"call": {"height": 32.5}}, "no size of images"),
]


@pytest.mark.parametrize(("path", "values", "says"), REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused(saved, tmp_path, kind, path, values, says):
    refused(saved(kind), tmp_path, path, values, says)


def refused(source, tmp_path, path, values, says):
    shutil.copytree(source, folder := tmp_path / "model")
    changed(folder, path, **values)
    with pytest.raises(UserError, match=says) as found:
        loading.load(folder)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("kind", "path", "values", "says"),
    [
        ("pixart_sigma", "transformer/config.json", {"out_channels": 6}, "in_channels 4 and out_channels 6"),
        ("pixart_sigma", "transformer/config.json", {"sample_size": 9}, "not divide by its patch_size 2"),
        ("pixart_sigma", "transformer/config.json", {"sample_size": 5000}, "6,250,000 tokens"),
        ("pixart_sigma", "transformer/config.json", {"caption_channels": 17}, "width 16, .* takes 17"),
        (
            "pixart_sigma",
            "transformer/config.json",
            {"use_additional_conditions": True},
            "is told the image's",
        ),
        ("sana", "transformer/config.json", {"guidance_embeds": True}, "SANA-Sprint"),
        ("sana", "transformer/config.json", {"timestep_scale": 0}, "timestep_scale 0"),
        ("sana", "transformer/config.json", {"num_layers": None}, "num_layers None"),
        ("sana", "text_encoder/config.json", {"hidden_size": "x"}, "hidden_size 'x'"),
        ("lumina2", "transformer/config.json", {"axes_lens": [200, 16, 16]}, "more than the 256 tokens"),
        ("lumina2", "transformer/config.json", {"out_channels": 8}, "out_channels 8"),
        ("lumina2", "vae/config.json", {"shift_factor": None}, "shift_factor None"),
        ("lumina2", "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, r"one, 1\.57987"),
        ("lumina2", "scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "set it to 1000"),
        ("z_image", "transformer/config.json", {"siglip_feat_dim": 8}, "siglip_feat_dim 8"),
        ("z_image", "transformer/config.json", {"all_patch_size": [1]}, "all_patch_size .* without the 2"),
        ("qwen_image", "transformer/config.json", {"guidance_embeds": True}, "guidance_embeds True"),
        ("qwen_image", "transformer/config.json", {"zero_cond_t": True}, "zero_cond_t True"),
        ("qwen_image", "transformer/config.json", {"in_channels": 32}, "in_channels 32 and out_channels 4"),
        ("qwen_image", "text_encoder/config.json", {"text_config": 3}, "text_config 3"),
    ],
)
def test_what_a_family_refuses(saved, tmp_path, kind, path, values, says):
    refused(saved(kind), tmp_path, path, values, says)


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("vae", "no folder vae"), ("text_encoder", "no folder text_encoder"),
        ("tokenizer/*.json", "no tokenizer in .*is it complete"),
        ("text_encoder/*.safetensors", "no safetensors"), ("transformer/*.safetensors", "no safetensors"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing(saved, tmp_path, kind, lost, says):
    shutil.copytree(saved(kind), folder := tmp_path / "model")
    for path in folder.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=says):
        loading.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_alone_is_refused(saved, kind):
    with pytest.raises(UserError, match="alone, without its text encoders and its autoencoder"):
        loading.load(saved(kind) / "transformer")


def test_an_autoencoder_of_another_scale_than_the_pipeline_counts_with(tmp_path):
    vae = masked_pipelines.autoencoder("pixart_sigma", shift_factor=0.1)
    made = masked_pipelines.pipeline(tmp_path / "parts", "lumina2", vae=vae)
    made.save_pretrained(tmp_path / "model", safe_serialization=True)
    with pytest.raises(UserError, match="of 4 pixels a side to a latent, and its pipeline works with 8"):
        loading.load(tmp_path / "model")
