"""Networks that are preconditioned, of EDM and of consistency models: stock draws the same, in and out."""

from __future__ import annotations

import dataclasses
import json

import diffusers
import pytest
import torch

import diffkd
from diffkd.core import samplers
from diffkd.core.schedules import ConsistencySchedule, EDMSchedule, Preconditioned
from diffkd.errors import UserError
from diffkd.models import saving, students
from diffkd.runs.reports import model_card
from tests import edm
from tests.edits import changed
from tests.stock import stock_pictures

EULER, CONSISTENCY = diffusers.EDMEulerScheduler, diffusers.CMStochasticIterativeScheduler
LABELS = [2, 0, 1]


def made(kind, folder, *, classes=None, make=edm.network, **options):
    return edm.save(folder, make(num_class_embeds=classes), kind(**options))


def drawn(denoiser, steps, classes=None):
    """By the denoiser's own sampler, with the generators that stock is given."""
    cond = {} if classes is None else {"class_labels": torch.tensor(LABELS)}
    own = edm.generators()
    noise = torch.cat([torch.randn((1, *denoiser.shape), generator=one) for one in own])
    with torch.no_grad():
        return samplers.sample(denoiser, noise, steps, denoiser.sampler, generator=own, **cond)


def assert_close(ours, theirs, first=1.0):
    """first: the largest value of the first state. Stock's Euler adds to a state what it then subtracts, and
    rounds images as it does states; ours does not, and so differs by that rounding."""
    rounding = 3 * torch.finfo(torch.float32).eps * first
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= max(1e-5 * theirs.abs().max(), rounding)


WIDEST = 80 * edm.noise().abs().max()  # of the first states, where sigma_max is 80


@pytest.mark.parametrize("steps", [1, 2, 4, 18])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("classes", [None, 3])
def test_an_edm_teacher_is_drawn_as_stock_draws_it(tmp_path, classes, prediction, steps):
    """On the stock scheduler's own grid of so many steps, in its order of operations but for rounding."""
    folder = made(EULER, tmp_path, classes=classes, prediction_type=prediction, sigma_data=0.6)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    teacher = diffkd.load(folder)
    own = dataclasses.replace(teacher.schedule, num_train_timesteps=max(steps, 2))
    own = own if steps > 1 else teacher.schedule
    teacher.schedule, teacher.call = own, dataclasses.replace(teacher.call, schedule=own)
    theirs, _ = edm.stock(pipeline, steps, None if classes is None else LABELS)
    assert_close(drawn(teacher, steps, classes), theirs, WIDEST)
    assert (teacher.num_classes, teacher.sampler, teacher.prediction) == (classes, "ddim", "sample")


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("classes", [None, 3])
def test_a_consistency_model_is_drawn_as_stock_draws_it(tmp_path, classes, clips, steps):
    """Every noise of its own generator: the level that a state is noised to counts from sigma_min. The last
    noise of stock is of width 0 but for rounding, before the root is taken."""
    options = {"clip_denoised": clips, "sigma_min": 0.05, "sigma_max": 20.0}
    folder = made(CONSISTENCY, tmp_path, classes=classes, make=edm.adm, **options)
    model = diffkd.load(folder)
    assert (model.sampler, model.clip) == ("renoise", 1.0 if clips else None)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs, _ = edm.stock(pipeline, steps, None if classes is None else LABELS)
    last = 0.05 * torch.finfo(torch.float32).eps ** 0.5 * (steps > 1)
    assert (drawn(model, steps, classes) - theirs).abs().max() <= 1e-5 + 4 * last
    assert theirs.std() > 0.1


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [EULER, CONSISTENCY])
@pytest.mark.parametrize("classes", [None, 3])
def test_a_student_opens_in_stock(tmp_path, kind, classes, steps):
    """On the even grid of its teacher's schedule; read again it has that schedule, not the grid's own."""
    student = diffkd.load(made(kind, tmp_path / "teacher", classes=classes))
    student.steps, student.clip = steps, None
    saving.save(student, tmp_path / "student")
    model_card.write(tmp_path / "student", model_card.describe(student))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    names = type(pipeline).__name__, type(pipeline.scheduler)
    assert names == ("ConsistencyModelPipeline", kind)
    theirs, pictures = edm.stock(pipeline, steps, None if classes is None else LABELS)
    again = diffkd.load(tmp_path / "student")
    assert_close(drawn(again, steps, classes), theirs, WIDEST)
    (images,) = diffkd.generate(again, 3, seed=5, labels=None if classes is None else LABELS)
    assert (images.int() - pictures).abs().max() <= 1
    assert (again.steps, again.sampler) == (steps, student.sampler)
    t = torch.linspace(0.01, 1, 20, dtype=torch.float64)
    assert torch.allclose(again.schedule.at(t)[1], student.schedule.at(t)[1], rtol=1e-9)


@pytest.mark.parametrize(("kind", "steps"), [(EULER, 4), (CONSISTENCY, 4)])
def test_a_student_draws_the_same_images_without_diffkd(tmp_path, kind, steps):
    """In a process that cannot import diffkd."""
    student = diffkd.load(made(kind, tmp_path / "teacher", classes=3))
    student.steps, student.clip = steps, None
    saving.save(student, tmp_path / "student")
    model_card.write(tmp_path / "student", model_card.describe(student))
    (stock,) = stock_pictures([(tmp_path / "student", steps)], tmp_path, 3, LABELS)
    (images,) = diffkd.generate(diffkd.load(tmp_path / "student"), 3, seed=5, labels=LABELS)
    assert abs(images.int().numpy() - stock["pictures"].astype(int)).max() <= 1
    assert str(stock["kind"]) == "ConsistencyModelPipeline" and stock["pictures"].std() > 5


@pytest.mark.parametrize("kind", [EULER, CONSISTENCY])
def test_one_step_is_the_same_by_either_sampler(tmp_path, kind):
    student = diffkd.load(made(kind, tmp_path / "teacher"))
    for sampler in ("ddim", "renoise"):
        student.steps, student.sampler, student.clip = 1, sampler, None
        saving.save(student, folder := tmp_path / sampler)
        model_card.write(folder, model_card.describe(student))
        again = diffkd.load(folder)
        theirs, _ = edm.stock(diffusers.DiffusionPipeline.from_pretrained(folder), 1)
        assert_close(drawn(again, 1), theirs, WIDEST)
        assert again.sampler == sampler


def test_a_network_alone_with_a_scheduler_that_is_named(tmp_path):
    edm.network().save_pretrained(tmp_path / "unet", safe_serialization=True)
    for name, kind in (("EDMEulerScheduler", EDMSchedule), (CONSISTENCY.__name__, ConsistencySchedule)):
        model = diffkd.load(tmp_path / "unet", scheduler=name)
        assert type(model.schedule) is kind and isinstance(model.call, Preconditioned)


def test_copies_and_smaller_students_are_preconditioned_too(tmp_path):
    teacher = diffkd.load(made(EULER, tmp_path))
    x, t = 20 * edm.noise(), torch.full((3,), 0.7, dtype=torch.float64)
    assert torch.equal(students.copy_of(teacher)(x, t), teacher(x, t))
    smaller = students.from_config(teacher, diffkd.models.unet.UNet2D(channels=[8], norm_groups=4))
    raw = smaller.network
    x0 = Preconditioned(teacher.schedule)(raw, x, teacher.schedule.network_time(t, x), {})
    assert torch.equal(smaller(x, t), x0)


@pytest.mark.parametrize("kind", [EULER, CONSISTENCY])
def test_its_images_are_near_to_what_is_noised_at_the_least_level(tmp_path, kind):
    """D(x, sigma_min) is x up to sigma_min for EDM, and x itself for a consistency model."""
    model = diffkd.load(made(kind, tmp_path))
    x = edm.noise()
    least = 1 / model.schedule.num_train_timesteps if kind is EULER else 1e-9
    t = torch.full((3,), least, dtype=torch.float64)
    gap = (model(x, t) - x).abs().max()
    assert gap < (0.02 if kind is EULER else 2e-6)


# what is refused


@pytest.mark.parametrize(
    ("kind", "path", "values", "says"),
    [
        (EULER, "scheduler/scheduler_config.json", {"sigma_schedule": "exponential"}, "sigma_schedule 'exp"),
        (EULER, "scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type 'sample'"),
        (EULER, "scheduler/scheduler_config.json", {"sigma_min": 90}, "sigma 90 to 80.0"),
        (EULER, "scheduler/scheduler_config.json", {"sigma_max": "wide"}, "cannot build"),
        (EULER, "scheduler/scheduler_config.json", {"num_train_timesteps": 10**7}, "num_train_timesteps"),
        (CONSISTENCY, "scheduler/scheduler_config.json", {"s_noise": 1.003}, "s_noise 1.003"),
        (CONSISTENCY, "scheduler/scheduler_config.json", {"sigma_max": 0.001}, "sigma 0.002 to 0.001"),
        (EULER, "model_index.json", {"_class_name": "DDPMPipeline"}, "DDPMPipeline with EDMEulerScheduler"),
        (EULER, "diffkd.json", {"steps": 4, "sampler": "renoise"}, "drawn by renoise, and its EDMEuler"),
        (EULER, "diffkd.json", {"num_train_timesteps": 50}, "num_train_timesteps 50, and the scheduler 1000"),
        (EULER, "diffkd.json", {"steps": 1001}, "not the last level of 1001 steps"),
        (CONSISTENCY, "diffkd.json", {"steps": 4, "sampler": "ddim"}, "drawn by ddim, and its CMStoch"),
        (CONSISTENCY, "diffkd.json", {"steps": 6, "sampler": "renoise"}, "6 steps does not fit a consist"),
        (CONSISTENCY, "diffkd.json", {"steps": 40, "sampler": "renoise"}, "one of 1, 2, 4, 5, 8, 10, 20"),
        (EULER, "unet/config.json", {"sample_size": [8, 16]}, "draws squares"),
    ],
)
def test_what_is_refused(tmp_path, kind, path, values, says):
    made(kind, tmp_path)
    (tmp_path / "diffkd.json").write_text("{}")
    changed(tmp_path, path, **values)
    with pytest.raises(UserError, match=says) as refused:
        diffkd.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_student_whose_scheduler_leaves_noise(tmp_path):
    made(EULER, tmp_path, final_sigmas_type="sigma_min")
    assert diffkd.load(tmp_path).steps is None  # a teacher's last level is replaced
    (tmp_path / "diffkd.json").write_text(json.dumps({"steps": 2}))
    with pytest.raises(UserError, match="final_sigmas_type 'sigma_min'.*leaves noise"):
        diffkd.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "steps", "sampler", "clip", "says"),
    [
        (EULER, 2, "renoise", None, "2 steps drawn by renoise does not fit an EDM schedule"),
        (EULER, 2, "ddim", 1.0, "EDMEulerScheduler does not bound x0 by 1"),
        (CONSISTENCY, 2, "ddim", None, "2 steps drawn by ddim does not fit a consistency model"),
        (CONSISTENCY, 3, "renoise", None, "3 steps does not fit a consistency model of 40 time steps"),
        (CONSISTENCY, 2, "renoise", 0.5, "CMStochasticIterativeScheduler does not bound x0 by 0.5"),
    ],
)
def test_students_that_no_stock_scheduler_draws(tmp_path, kind, steps, sampler, clip, says):
    student = diffkd.load(made(kind, tmp_path / "teacher"))
    student.steps, student.sampler, student.clip = steps, sampler, clip
    with pytest.raises(UserError, match=says):
        saving.save(student, tmp_path / "student")
    assert not (tmp_path / "student").exists()


# networks in the form of ADM


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_a_learned_variance_is_left_out(tmp_path, variance):
    """The x0 is that of the stock scheduler, which takes the first half; students have no second one, as no
    stock scheduler that draws them takes it."""
    unet = edm.adm(out_channels=6)
    scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=False)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "teacher")
    teacher = diffkd.load(tmp_path / "teacher")
    assert teacher.network.config.out_channels == 3 and teacher.prediction == "epsilon"
    x, index = edm.noise(), 400
    with torch.no_grad():
        output = unet(x, torch.tensor(index)).sample
        ours = teacher(x, torch.full((3,), (index + 1) / 1000, dtype=torch.float64))
    learned = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    theirs = learned.step(output, index, x, generator=torch.Generator()).pred_original_sample
    assert_close(ours, theirs)

    student = students.copy_of(teacher)
    student.steps = 5
    saving.save(student, tmp_path / "student")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": edm.generators(), "num_inference_steps": 5, "output_type": "np"}
    images = pipeline(3, **options).images
    (pictures,) = diffkd.generate(student, 3, seed=5)
    assert abs(pictures.int().numpy() - (images * 255).round()).max() <= 1


def test_labels_that_are_embedded_as_times_are(tmp_path):
    unet = edm.adm(num_class_embeds=3, class_embed_type="timestep")
    edm.save(tmp_path, unet, EULER())
    student = diffkd.load(tmp_path)
    student.steps = 2
    saving.save(student, tmp_path / "student")
    theirs, _ = edm.stock(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student"), 2, LABELS)
    assert_close(drawn(student, 2, classes=3), theirs, WIDEST)
    other, _ = edm.stock(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student"), 2, [0, 0, 0])
    assert (theirs - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"out_channels": 5}, "in_channels 3 and out_channels 5; supported are as many, or twice as many"),
        ({"class_embed_type": "timestep"}, "class_embed_type timestep and no num_class_embeds"),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity', which is not supported"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier', which is not supported"),
    ],
)
def test_networks_that_stock_pipelines_do_not_draw(tmp_path, options, says):
    edm.save(tmp_path, edm.network(**options), EULER())
    with pytest.raises(UserError, match=says):
        diffkd.load(tmp_path)
