"""The stages of a run, planned before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from diffkd import methods
from diffkd.core.denoiser import Denoiser
from diffkd.core.digest import digest
from diffkd.core.guidance_kinds import set_kind
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.models.families import sd
from diffkd.runs import plans
from diffkd.runs.config import Distill
from tests import text_to_image
from tests.refusals import refuse
from tests.runs.tiny import CONFIG, UNMEASURED, write
from tests.tiny import student


def test_stages_of_one_step_count_have_the_names_of_their_methods():
    """The best chains end with several students of one step, each the next one's start."""
    config = Distill.model_validate({
        "out": "run", "teacher": {"path": "teacher"}, "data": {"kind": "digits"}, "evaluation": None,
        "method": [
            {"name": "progressive", "steps": [4, 1]}, {"name": "dmd2"}, {"name": "dmd2"},
            {"name": "consistency", "steps": [4, 2]},
        ],
    })  # fmt: skip
    plan = plans.plan(config, student(4, "v_prediction", Schedule.cosine(64), steps=None))
    names = [one.name for _, stage in plan for one in stage.students]
    assert names == [
        "4-steps", "1-steps", "1-steps-dmd2", "1-steps-dmd2-2", "4-steps-consistency", "2-steps-consistency",
    ]  # fmt: skip
    assert [stage.teacher for _, stage in plan] == ["previous", "previous", *["original"] * 3]


def planned(*chain, **teacher):
    """The plan of these methods, of an epsilon teacher."""
    config = Distill.model_validate({
        "out": "run", "teacher": {"path": "teacher"}, "data": {"kind": "digits"}, "evaluation": None,
        "method": list(chain),
    })  # fmt: skip
    model = student(5, "epsilon", from_diffusers(DDPMScheduler()), steps=None)
    model.num_classes, model.null_label = 4, 4
    for name, value in teacher.items():
        setattr(model, name, value)
    return plans.plan(config, model), model


def test_a_teacher_of_no_classes_is_guided_against_a_worse_model():
    """Wherever in the chain it is asked; what its students learn says so."""
    method = [{"name": "progressive", "steps": [2], "guidance": 2.0}, {"name": "dmd2", "guidance": 1.5}]
    teacher = {"path": "teacher", "guidance_kind": {"worse": "small"}}
    config = Distill.model_validate({
        "out": "run", "teacher": teacher, "data": {"kind": "digits"}, "evaluation": None, "method": method,
    })  # fmt: skip
    model, small = (student(None, "v_prediction", Schedule.cosine(64), steps=None, seed=i) for i in (0, 1))
    with pytest.raises(UserError, match="means no class"):
        plans.plan(config, model)
    set_kind(model, worse=small)
    plan = plans.plan(config, model)
    kinds = [plans.taught(plan, index, model)["guidance_kind"]["worse"]["sha256"] for index in (0, 1)]
    assert kinds == [digest(small.network.state_dict())] * 2
    assert [plans.taught(plan, index, model)["guidance_baked_in"] for index in (0, 1)] == [2.0, 1.5]


TO_V = {"name": "output", "prediction": "v_prediction"}


@pytest.mark.parametrize("name", sorted({*methods.names()} - {"logits", "denoising", "guidance"}))
def test_every_method_takes_an_epsilon_teacher_at_once_or_after_it_predicts_v(name):
    """An epsilon network has no x0 at pure noise: a method sees to that itself, or names the remedy."""
    more = {"steps": [10, 5, 1]} if name == "progressive" else {}
    chain = [{"name": "consistency"}] * (name == "tcm") + [{"name": name, **more}]
    if name in ("progressive", "output", "feature", "regression", "reflow"):
        planned(*chain)
    else:
        with pytest.raises(UserError) as refused:
            planned(*chain)
        assert "put {name: output, prediction: v_prediction} before this method" in str(refused.value)
    last = planned(TO_V, *chain)[0][-1][1]
    assert last.name.removesuffix(f"-{name}") in ("1-steps", name)


EVERY_TIME = (
    "consistency", "scm", "lcm", "meanflow", "shortcut", "imm", "dmd2", "f_distill", "sid", "adversarial",
)  # fmt: skip


@pytest.mark.parametrize("name", EVERY_TIME)
def test_a_student_that_knows_all_times_teaches_any_method_and_one_of_few_steps_does_not(name):
    mode = {"mode": "distillation"} if name == "imm" else {}
    method = {"name": name, **mode}
    previous = {**method, "teacher": "previous"}
    assert planned(TO_V, previous)[0][-1][1].teacher == "previous"
    message = "every noise level, and the student before it is a student of 5 steps, which knows no"
    with pytest.raises(UserError, match=message):
        planned({"name": "progressive", "steps": [5]}, previous)
    message = "every noise level, and the run's teacher is a student of 5 steps, which knows no"
    for sampler in ("ddim", "renoise"):
        with pytest.raises(UserError, match=message):
            planned(method, steps=5, sampler=sampler, prediction="v_prediction")
    if name in ("consistency", "scm", "meanflow", "shortcut", "imm"):
        planned({"name": name, "mode": "training"}, steps=5, sampler="ddim", prediction="v_prediction")


def test_a_teacher_by_name_is_a_student_before_the_stage():
    tuned = {"name": "output", "prediction": "v_prediction"}
    halved = {"name": "progressive", "steps": [10, 5]}
    plan, _ = planned(tuned, halved, {"name": "dmd2", "teacher": "output"})
    assert plan[-1][1].teacher == "output" and plans.maker(plan, len(plan) - 1) == "output"
    for name in ("1-steps", "teacher", "10"):
        message = rf"learn from '{name}', .* is one of original, previous, output, 10-steps, 5-steps$"
        with pytest.raises(UserError, match=message):
            planned(tuned, halved, {"name": "dmd2", "teacher": name})
    with pytest.raises(
        UserError, match="and student 10-steps is a student of 10 steps, which knows no others"
    ):
        planned(tuned, halved, {"name": "dmd2", "teacher": "10-steps"})
    one = {"name": "regression", "teacher": "10-steps", "pair_steps": 10}
    assert planned(tuned, halved, one)[0][-1][1].teacher == "10-steps"
    with pytest.raises(UserError, match="is itself a student of 5 steps of ddim and draws in no others"):
        planned(tuned, halved, {**one, "teacher": "5-steps"})


def test_a_run_goes_on_from_a_student_of_few_steps_in_those_steps():
    few = {"steps": 4, "sampler": "ddim", "prediction": "v_prediction"}
    planned({"name": "progressive", "steps": [2, 1]}, **few)
    planned({"name": "progressive", "steps": [1], "substeps": 4}, **few)
    with pytest.raises(UserError, match=r"the run's teacher, which knows its own 4 .* let 2 x 1 be these"):
        planned({"name": "progressive", "steps": [1]}, **few)


class Fused(torch.autograd.Function):
    """Attention of a library that has written its gradient, and no other derivative."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


def test_what_follows_a_student_that_takes_its_weight_can_ask_it():
    """Features and a derivative are of the student before a stage, heads of a teacher: as it will be."""
    network, given = text_to_image.network(), text_to_image.conditions(1)
    model = Denoiser(
        network, Schedule.cosine(64), "v_prediction", shape=(4, 8, 8), call=sd.call, example=given
    )
    model.set_null(given)
    first = {"name": "guidance", "range": [1, 8]}

    def names(*chain: Any) -> list[str]:
        config = Distill.model_validate({
            "out": "run", "teacher": {"path": "teacher"}, "data": {"kind": "digits"}, "evaluation": None,
            "method": [first, *chain],
        })  # fmt: skip
        return [stage.name for _, stage in plans.plan(config, model)]

    assert names({"name": "feature"}) == ["guidance", "feature"]
    assert names({"name": "scm", "derivative": "jvp", "steps": [1]}) == ["guidance", "1-steps"]
    for name in ("adversarial", "f_distill"):
        with pytest.raises(UserError, match="compares with networks that do not know the weight"):
            names({"name": name, "teacher": "previous"})
    assert network.config.time_cond_proj_dim is None, "the run's teacher is as it was"


NO_DERIVATIVE = ["a part without a forward-mode derivative", "set method.derivative to difference"]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": "scm", "derivative": "jvp"}, NO_DERIVATIVE),
        ([{"name": "output"}, {"name": "meanflow", "derivative": "jvp"}], NO_DERIVATIVE),
        (
            {"name": "dmd2", "gan": 1e-3, "blocks": ["mid"]},
            ["method.blocks names 'mid', which the network does not have; it has down_blocks.0"],
        ),
        (
            [{"name": "progressive", "steps": [4]}, {"name": "dmd2", "teacher": "previous"}],
            ["asks its teacher at every noise level", "student of 4 steps", "set method.teacher: original"],
        ),
    ],
    ids=["scm", "meanflow", "blocks", "teacher"],
)
def test_what_no_training_could_begin_with_is_refused_before_anything_is_written(
    deep_teacher, cli, tmp_path, monkeypatch, method, says
):
    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **o: Any) -> torch.Tensor:
        return Fused.apply(query, key, value)  # type: ignore[no-any-return]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    write("run.yaml", {**CONFIG, **UNMEASURED}, teacher={"path": str(deep_teacher)}, method=method)
    refuse(cli, tmp_path, "distill", "run.yaml", says=says)


@pytest.mark.parametrize("name", ["scm", "meanflow"])
def test_attention_that_torch_differentiates_is_taken_by_jvp(name):
    assert planned(TO_V, {"name": name, "derivative": "jvp"})[0][-1][0].derivative == "jvp"


@pytest.mark.parametrize(
    ("chain", "baked_in", "samplers"),
    [
        (  # each stage learns from the student before it
            [{"name": "progressive", "steps": [10, 5], "guidance": 1.1, "sampler": "heun"}],
            [1.1, 1.1, 1.1], ["ddim", "heun", "ddim"],
        ),
        (  # from the run's own teacher, unguided; then guided by itself
            [
                {"name": "progressive", "steps": [5], "guidance": 1.1}, {"name": "dmd2", "guidance": 1.0},
                {"name": "dmd2", "guidance": 1.3},
            ],
            [1.1, 1.1, 1.0, 1.3], ["ddim", "ddim", None, None],
        ),
        (  # pairs of the student before it, which has guidance baked in
            [
                {"name": "progressive", "steps": [5], "guidance": 1.1},
                {"name": "regression", "teacher": "previous", "pair_steps": 5},
                {"name": "regression", "pair_steps": 8, "sampler": "heun"},
            ],
            [1.1, 1.1, 1.1, 1.0], ["ddim", "ddim", "ddim", "heun"],
        ),
        (  # the boundary of tcm is the guided student's
            [TO_V, {"name": "consistency", "guidance": 1.2, "sampler": "heun"}, {"name": "tcm"}],
            [1.0, 1.2, 1.2], [None, "heun", None],
        ),
        (
            [TO_V, {"name": "consistency", "mode": "training"}, {"name": "lcm", "guidance": 0.5}],
            [1.0, 1.0, 0.5], [None, None, "ddim"],
        ),
        (  # from the first student, whose guidance it keeps, and not that of the one between
            [
                {"name": "feature", "guidance": 1.2}, {"name": "progressive", "steps": [5], "guidance": 1.1},
                {"name": "dmd2", "teacher": "feature"},
            ],
            [1.2, 1.1, 1.1, 1.2], [None, "ddim", "ddim", None],
        ),
    ],
    ids=["progressive", "dmd2", "pairs", "tcm", "lcm", "by name"],
)  # fmt: skip
def test_cards_say_how_each_student_was_taught(chain, baked_in, samplers):
    plan, teacher = planned(*chain)
    cards = [plans.taught(plan, index, teacher) for index in range(len(plan))]
    assert [card["guidance_baked_in"] for card in cards] == baked_in
    assert [card.get("teacher_sampler") for card in cards] == samplers


def test_a_teacher_with_guidance_baked_in_passes_it_on():
    plan, teacher = planned(TO_V, {"name": "dmd2"}, {"name": "dmd2", "guidance": 3.0}, guidance_baked_in=2.0)
    cards = [plans.taught(plan, index, teacher) for index in range(3)]
    assert [card["guidance_baked_in"] for card in cards] == [2.0, 2.0, 3.0]
