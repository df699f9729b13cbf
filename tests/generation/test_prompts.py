"""Sampling from prompts: the stock pipeline's images, files that say their prompt, what is refused."""

from __future__ import annotations

import json
import re

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.generation import prompts
from diffkd.generation.generator import ImageGenerator, generate
from diffkd.models import loading, saving
from tests import text_to_image

PROMPTS = ["a small red ring", "two stars, one blue", "a cross above a square"]


@pytest.fixture(scope="module", params=["sd", "xl"])
def model(request, tmp_path_factory):
    """A folder with a teacher, and a student of two steps that is a copy of it."""
    work = tmp_path_factory.mktemp(request.param)
    made = text_to_image.pipeline(work / "parts", xl=request.param == "xl", prediction="v_prediction")
    made.save_pretrained(work / "teacher", safe_serialization=True)
    student = loading.load(work / "teacher")
    student.steps = 2
    saving.save(student, work / "student")
    (work / "student" / "diffkd.json").write_text('{"steps": 2, "sampler": "ddim"}')
    return work


def stock(folder, count, **options):
    """uint8 images of the stock pipeline as integers, (B, H, W, 3)."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(7 + i) for i in range(count)]
    images = pipeline(
        [PROMPTS[i % 3] for i in range(count)],
        num_inference_steps=2,
        generator=generators,
        output_type="np",
        **{"height": 32, "width": 32, **options},
    ).images
    return np.rint(images * 255).astype(int)


def test_one_prompt_is_for_all_and_not_letter_by_letter(model):
    denoiser = loading.load(model / "student")
    one, listed = (next(generate(denoiser, 2, prompts=given)) for given in (PROMPTS[0], PROMPTS[:1]))
    assert torch.equal(one, listed)


def drawn(denoiser, count, **options):
    batches = generate(denoiser, count, prompts=PROMPTS, seed=7, steps=2, **options)
    return torch.cat([*batches]).int().numpy()


def test_the_command_draws_the_stock_pipelines_images(cli, model, tmp_path):
    """At its default arguments; the prompt is in every file; image i is of prompt i modulo their number."""
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:2], "", PROMPTS[2]]) + "\n")
    given = ("--prompts", tmp_path / "prompts.txt", "-n", 2, "--seed", 7, "--batch-size", 4)
    out = ("sample", model / "student", "--out", tmp_path / "out")
    assert cli(*out, *given).code == 0
    theirs, paths = stock(model / "student", 6), sorted((tmp_path / "out").glob("*.png"))
    assert len(paths) == 6
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            assert image.text["prompt"] == PROMPTS[i % 3]
            assert np.abs(np.asarray(image).astype(int) - theirs[i]).max() <= 1
    before = paths[4].read_bytes()  # one that is lost is drawn again as it was
    paths[4].unlink()
    assert cli(*out, *given).code == 0 and paths[4].read_bytes() == before
    other = cli(*out, "--prompt", "else", "-n", 6, "--seed", 7)
    assert other.code == 2 and "other settings" in other.stderr
    assert re.search(r"prompts.sha256 was [0-9a-f]{8}\.\.\., now [0-9a-f]{8}\.\.\.\)", other.stderr)


def test_guidance_and_a_negative_prompt(model, tmp_path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model / "teacher", safety_checker=None)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        {**pipeline.scheduler.config, "timestep_spacing": "trailing", "set_alpha_to_one": True},
        clip_sample=False,
    )
    pipeline.save_pretrained(tmp_path / "trailing")
    teacher = loading.load(model / "teacher")
    for negative in ("green", None):  # the first does not stay
        theirs = stock(
            tmp_path / "trailing", 3, guidance_scale=3.0, negative_prompt=negative and [negative] * 3
        )
        ours = drawn(teacher, 3, guidance=3.0, negative=negative)
        assert np.abs(ours - theirs).max() <= 1


def test_images_of_another_size(model):
    student = loading.load(model / "student")
    ours, theirs = drawn(student, 2, size=(16, 48)), stock(model / "student", 2, height=16, width=48)
    assert ours.shape == (2, 16, 48, 3) and np.abs(ours - theirs).max() <= 1
    with pytest.raises(ValueError, match="17x16 do not divide by 4"):
        ImageGenerator(student, 2, prompts=PROMPTS, size=(16, 17))


def test_one_npz_holds_its_prompts(cli, model, tmp_path):
    out = tmp_path / "out.npz"
    assert cli("sample", model / "student", "--out", out, "--prompt", "a star", "-n", 3).code == 0
    with np.load(out) as content:
        assert content["arr_0"].shape == (3, 32, 32, 3) and json.loads(str(content["prompts"])) == ["a star"]


def test_prompts_are_encoded_once_and_the_encoders_freed(model, monkeypatch):
    student, encoded = loading.load(model / "student"), []
    kind = type(student.conditioner)
    embed = kind.embed
    monkeypatch.setattr(
        kind, "embed", lambda self, given, size: encoded.append(given) or embed(self, given, size)
    )
    assert drawn(student, 7, batch_size=2).shape == (7, 32, 32, 3)
    assert encoded == [PROMPTS] and "networks" not in student.conditioner.__dict__
    # where they are too many for the memory, those of each batch
    few, every = (
        prompts.PromptEmbeddings(student.conditioner, PROMPTS * 2, 7, (32, 32), held) for held in (1, 1 << 30)
    )
    for key, value in few.batch(3, 7).items():
        assert torch.allclose(value, every.batch(3, 7)[key], atol=1e-6)
    assert encoded[1:] == [PROMPTS, PROMPTS] and "networks" not in student.conditioner.__dict__


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((), ["draws from prompts", "--prompts"]),
        (("--prompt", "a", "--prompts", "p.txt"), ["both given"]),
        (("--prompt", "a", "--classes", "0-2"), ["labels", "draws from prompts"]),
        (("--prompt", "a", "--height", 16), ["--height and --width"]),
        (("--prompt", "a", "--negative", "b"), ["negative", "guidance"]),
        (("--prompt", "caf\udce9"), ["prompt 'caf\\udce9' is not text in UTF-8"]),
        (("--prompt", "a", "-w", 2, "--negative", "\udce9"), ["negative prompt '\\udce9' is not text"]),
        (("--prompts", "absent.txt"), ["absent.txt", "cannot be read"]),
        (("--prompts", "empty.txt"), ["empty.txt", "no prompts"]),
        (("--prompts", "nul.txt"), ["nul.txt", "NUL", "line 2"]),
        (("--prompts", "long.txt"), ["long.txt", "100,001 characters", "line 1"]),
    ],
)
def test_what_is_refused(cli, model, tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    for name, text in {"p": "x", "empty": " \n\n", "nul": "a\nb\0c\n", "long": "a" * 100_001}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    outcome = cli("sample", model / "student", "--out", "out", "-n", 1, *given)
    assert outcome.code == 2 and all(word in outcome.stderr for word in says)
    assert not (tmp_path / "out").exists()


def test_prompts_for_a_model_that_takes_none(cli, make_pipeline, tmp_path):
    folder = make_pipeline(tmp_path)
    for given in (("--prompt", "a"), ("--negative", "a"), ("--height", 8, "--width", 8)):
        outcome = cli("sample", folder, "--out", tmp_path / "out", "-n", 1, "--steps", 1, *given)
        assert outcome.code == 2 and "leave" in outcome.stderr


def test_traced_as_one_graph_with_its_autoencoder(model):
    """What mode compile does, without its generation of code."""
    generator = ImageGenerator(loading.load(model / "student"), 2, prompts=PROMPTS, batch_size=2)
    with torch.inference_mode():
        eager = next(generator.batches())
        cond = generator._cond(0)
        inputs = generator._noise(0), *(cond[key] for key in generator.keys)
        traced, _ = torch.compile(generator.pixels, backend="eager", fullgraph=True)(*inputs)
    assert (traced.int() - eager.int()).abs().max() <= 1
