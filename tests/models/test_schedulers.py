"""A pipeline's scheduler: every field of its config is honoured, replaced by diffkd's sampler, or refused."""

from __future__ import annotations

import contextlib
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import diffkd
from diffkd.core.scheduler_config import CLIPPING, FIELDS, ONLY, READ, REPLACED, SCHEDULERS, check_scheduler
from diffkd.core.schedules import from_betas, from_diffusers, to_diffusers
from diffkd.errors import UserError
from diffkd.generation.generator import generate
from diffkd.generation.stock import generate_stock
from diffkd.models import loading

T = 40
INSTALLED = [
    kind
    for kind in (getattr(diffusers, name, None) for name in SCHEDULERS)
    if kind is not None and issubclass(kind, diffusers.SchedulerMixin)  # not a stand-in for a missing package
]
BETAS: list[dict[str, Any]] = [
    {"beta_schedule": "linear", "beta_start": 0.002, "beta_end": 0.15},
    {"beta_schedule": "scaled_linear", "beta_start": 0.01, "beta_end": 0.3},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(1e-3, 0.2, T).tolist()},
]


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def parameters(kind: type) -> list[str]:
    given = inspect.signature(kind.__init__).parameters.values()
    return [p.name for p in given if p.name != "self" and p.kind is not p.VAR_KEYWORD]


# the table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INSTALLED, ids=lambda kind: kind.__name__)
def test_every_field_is_in_the_table(kind):
    """A field of a newer diffusers fails here: it has to be looked at before it is drawn over."""
    assert set(parameters(kind)) <= FIELDS


def test_the_table_says_one_thing_of_a_field():
    kinds = [READ, REPLACED, frozenset(ONLY), {"timestep_scaling"}]
    assert sum(map(len, kinds)) == len(FIELDS)
    used = {name for kind in INSTALLED for name in parameters(kind)}
    # of DPMSolverSDEScheduler, which needs torchsde, and of newer ones than the oldest diffusers has
    assert FIELDS - used <= {"noise_sampler_seed", "shift_terminal"}


@pytest.mark.parametrize("kind", INSTALLED, ids=lambda kind: kind.__name__)
def test_those_that_bound_x0_are_those_that_say_so(kind):
    """By the source of diffusers: a scheduler reads the field in its step, or does nothing with it."""
    reads = "config.clip_sample_range" in inspect.getsource(kind)
    assert reads == (kind.__name__ in CLIPPING)


@pytest.mark.parametrize(
    "name", sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and n not in SCHEDULERS)
)
def test_every_other_scheduler_is_refused(name):
    kind = getattr(diffusers, name)
    try:
        scheduler = kind()
    except Exception:
        pytest.skip("it needs arguments or a package")
    with pytest.raises(UserError, match="is not supported; supported are discrete schedulers"):
        from_betas(scheduler)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {"thresholding": True}) for kind in INSTALLED if "thresholding" in parameters(kind)]
    + [
        (kind, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"})
        for kind in INSTALLED
        if "use_flow_sigmas" in parameters(kind)
    ]
    + [
        (
            diffusers.EulerDiscreteScheduler,
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        ),
        (diffusers.LCMScheduler, {"timestep_scaling": 0.1}),
        (diffusers.LCMScheduler, {"timestep_scaling": 1e20}),
        (diffusers.DDIMScheduler, {"prediction_type": "flow"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or next(iter(value)),
)
def test_what_is_refused(kind, options, tmp_path, make_pipeline):
    scheduler = kind(num_train_timesteps=T, **options)
    with pytest.raises(UserError, match=f"{kind.__name__} has {next(iter(options))}|prediction_type"):
        from_betas(scheduler)
    folder = make_pipeline(tmp_path, pipeline="DDPMPipeline")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    rewrite(folder / "model_index.json", scheduler=[index["scheduler"][0], kind.__name__])
    with pytest.raises(UserError, match=f"{kind.__name__} has"):
        loading.load(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("FlowMatchEulerDiscreteScheduler", "scheduler {} has no betas, and is not supported"),
        ("EDMEulerScheduler", "DDPMPipeline with {}, for whose inputs it has no scale"),
        ("CMStochasticIterativeScheduler", "DDPMPipeline with {}, for whose inputs it has no scale"),
    ],
)
def test_a_pipeline_of_another_path_is_refused(name, says, tmp_path, make_pipeline):
    """That pipeline does not go by them."""
    folder = make_pipeline(tmp_path, pipeline="DDPMPipeline")
    getattr(diffusers, name)().save_pretrained(folder / "scheduler")
    rewrite(folder / "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(UserError, match=says.format(name)):
        loading.load(folder)


def test_a_field_of_a_newer_diffusers(make_pipeline, tmp_path):
    """At its default it changes nothing; at any other value diffkd cannot know what it changes."""

    class Newer(diffusers.DDIMScheduler):
        @diffusers.configuration_utils.register_to_config
        def __init__(self, num_train_timesteps: int = T, beta_end: float = 0.02, twist: float = 0.5) -> None:
            super().__init__(num_train_timesteps=num_train_timesteps, beta_end=beta_end)
            self.register_to_config(twist=twist)

    check_scheduler(Newer())
    with pytest.raises(
        UserError, match="Newer has twist 0.7, a setting that this version of diffkd does not"
    ):
        check_scheduler(Newer(twist=0.7))


def test_a_field_that_nothing_knows_is_said(make_pipeline, tmp_path, caplog):
    folder = make_pipeline(tmp_path)
    rewrite(folder / "scheduler/scheduler_config.json", twist=3, off=None)
    rewrite(folder / "unet/config.json", wider=True, old=False)
    loading.load(folder)
    said = [record.getMessage() for record in caplog.records if record.name == "diffkd"]
    assert len(said) == 2 and "wider" in said[0] and "twist" in said[1]


# numbers --------------------------------------------------------------------------------------------------


def own_x0(scheduler: Any, output: torch.Tensor, index: int, x_t: torch.Tensor) -> torch.Tensor | None:
    """x0 as the scheduler itself makes it of the network's output; None where it has no name for it."""
    if hasattr(scheduler, "convert_model_output") and "DEIS" not in type(scheduler).__name__:  # which has eps
        scheduler.set_timesteps(T)
        scheduler._step_index = int((scheduler.timesteps == index).nonzero()[0])
        return scheduler.convert_model_output(output, sample=x_t)
    if type(scheduler).__name__ in ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler"):
        scheduler.set_timesteps(T)
        return scheduler.step(output, index, x_t).pred_original_sample
    if type(scheduler).__name__ in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        scheduler.set_timesteps(T)
        sigma = scheduler.sigmas[int((scheduler.timesteps == index).nonzero()[0])]
        time = torch.tensor(float(index))
        scheduler.scale_model_input(x_t, time)
        return scheduler.step(output, time, x_t * (sigma**2 + 1) ** 0.5).pred_original_sample
    return None


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # of numpy, by diffusers
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", INSTALLED, ids=lambda kind: kind.__name__)
def test_the_table_and_x0_are_the_schedulers_own(kind, seed):
    """Random values of what is read: the same noise levels, and the same x0 of the same output."""
    rng = np.random.default_rng([seed, INSTALLED.index(kind)])
    own = parameters(kind)
    options: dict[str, Any] = {"num_train_timesteps": T, **BETAS[rng.integers(len(BETAS))]}
    options["prediction_type"] = str(rng.choice(["epsilon", "v_prediction"]))
    if "rescale_betas_zero_snr" in own:
        options["rescale_betas_zero_snr"] = options["prediction_type"] == "v_prediction"
    clips = kind.__name__ in CLIPPING
    if clips:
        options |= {"clip_sample": bool(rng.integers(2)), "clip_sample_range": float(rng.uniform(0.2, 1))}
    scheduler = kind(**options)
    schedule = from_diffusers(scheduler)
    assert (schedule.alphas_cumprod - scheduler.alphas_cumprod.double()).abs().max() < 1e-6

    generator = torch.Generator().manual_seed(seed)
    output, x_t = torch.randn(2, 1, 3, 4, 4, generator=generator)
    index = int(rng.integers(1, T - 1))
    made = own_x0(scheduler, output, index, x_t)
    if made is None:
        return
    denoiser = diffkd.Denoiser(lambda *_: output, schedule, options["prediction_type"])
    denoiser.network.parameters = lambda: iter([torch.zeros(1)])
    x0 = denoiser(x_t, (index + 1) / T)
    if clips and options["clip_sample"]:
        x0 = x0.clamp(-options["clip_sample_range"], options["clip_sample_range"])
    assert (x0 - made).abs().max() < 2e-4 * made.abs().max()


def stock_and_ours(folder: Path, steps: int, classes: int | None, **options: Any) -> tuple[Any, Any]:
    labels = None if classes is None else torch.arange(6) % classes
    pipeline = loading.open_stock(folder)
    stock = next(generate_stock(pipeline, 6, steps=steps, seed=3, labels=labels))
    return stock, next(generate(loading.load(folder), 6, steps=steps, seed=3, labels=labels, **options))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("classes", [None, 3])
def test_honoured_fields_give_the_stock_pipelines_pixels(seed, classes, tmp_path, make_pipeline):
    """Random values of everything that is read, on the grid that diffkd's samplers have."""
    rng = np.random.default_rng([seed, classes or 0])
    folder = make_pipeline(tmp_path, classes=classes, pipeline=None if classes else "DDIMPipeline")
    lcm = bool(classes and seed % 2)
    prediction = str(rng.choice(["epsilon", "v_prediction", "sample"]))
    options: dict[str, Any] = {
        "num_train_timesteps": T, **BETAS[seed % len(BETAS)], "prediction_type": prediction,
        "rescale_betas_zero_snr": prediction != "epsilon", "clip_sample": bool(rng.integers(2)),
        "clip_sample_range": float(rng.uniform(0.3, 1)),
    }  # fmt: skip
    grid = {"original_inference_steps": T} if lcm else {"timestep_spacing": "trailing"}
    kind = diffusers.LCMScheduler if lcm else diffusers.DDIMScheduler
    kind(**options, **grid).save_pretrained(folder / "scheduler")
    rewrite(folder / "model_index.json", scheduler=["diffusers", kind.__name__])
    stock, ours = stock_and_ours(folder, int(rng.choice([1, 2, 4, 5])), classes)
    assert ours.float().std() > 5
    assert (stock.int() - ours.int()).abs().max() <= (1 if lcm else 0)  # LCM's default scaling costs 6e-7


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
def test_a_ddim_pipeline_makes_a_ddim_scheduler_of_any_other(kind, tmp_path, make_pipeline):
    """With the fields that the other one does not have at DDIM's own defaults, such as clip_sample."""
    folder = make_pipeline(tmp_path, prediction="sample")
    options = {"num_train_timesteps": T, "prediction_type": "sample", "timestep_spacing": "trailing"}
    getattr(diffusers, kind)(**options).save_pretrained(folder / "scheduler")
    rewrite(folder / "model_index.json", scheduler=["diffusers", kind])
    stock, ours = stock_and_ours(folder, 4, None)
    assert torch.equal(stock, ours)
    assert loading.load(folder).clip == (None if kind == "LCMScheduler" else 1.0)


def test_the_class_that_the_index_names_is_the_one_that_diffusers_builds(tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path, pipeline="DDPMPipeline")
    diffusers.LCMScheduler(num_train_timesteps=T).save_pretrained(folder / "scheduler")
    rewrite(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert type(loading.open_stock(folder).scheduler).__name__ == "DDIMScheduler"
    assert loading.load(folder).sampler == "ddim"


# cards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ({"steps": 1_000_000}, "a student of 1000000 steps does not fit"),
        ({"steps": 3}, "a student of 3 steps does not fit"),
        ({"steps": 2_000}, "does not fit"),
        ({"num_train_timesteps": 1000}, "num_train_timesteps 1000, and the scheduler 1024"),
        ({"steps": 4, "sampler": "renoise"}, "drawn by renoise, and its .* has"),
        ({"num_classes": 12}, "num_classes 12, and the network has 11"),
        ({"num_classes": 10, "null_label": 11}, "null_label 11, and the network has 11"),
        ({"guidance_baked_in": "2"}, "guidance_baked_in '2'"),
        ({"guidance_baked_in": 1e12}, "guidance_baked_in"),
        ({"sampler": "heun"}, "neither ddim nor renoise"),
    ],
    ids=str,
)  # fmt: skip
def test_cards_that_promise_what_the_model_has_not(card, says, tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path, classes=11)
    (folder / "diffkd.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=says):
        loading.load(folder)


@pytest.mark.parametrize(
    "entry", [[], {}, None, "x", 5, [None], [[]], ["diffusers"], ["diffusers", 5]], ids=repr
)
@pytest.mark.parametrize("part", ["scheduler", "unet", "_class_name"])
def test_an_index_of_any_form_opens_or_is_refused(part, entry, tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: entry}))
    with contextlib.suppress(UserError):
        loading.load(folder)


def test_classes_of_an_unconditional_network(tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    for card in ({"num_classes": 3}, {"null_label": 0}):
        (folder / "diffkd.json").write_text(json.dumps(card))
        with pytest.raises(UserError, match="the network has no class embeddings"):
            loading.load(folder)


@pytest.mark.parametrize(
    "changes", [{"timestep_spacing": "leading"}, {"set_alpha_to_one": False}], ids=lambda c: next(iter(c))
)
def test_a_students_scheduler_that_draws_otherwise(changes, tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    (folder / "diffkd.json").write_text('{"steps": 4, "sampler": "ddim"}')
    assert loading.load(folder).steps == 4
    rewrite(folder / "scheduler/scheduler_config.json", **changes)
    with pytest.raises(UserError, match=f"has {next(iter(changes))} .*, with which the stock pipeline draws"):
        loading.load(folder)


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
def test_the_scheduler_that_a_student_is_saved_with_is_taken(sampler):
    check_scheduler(to_diffusers(diffkd.schedules.Schedule.cosine(64), "v_prediction", 1.0, sampler))
