"""Every stage of a distillation, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import chain, count
from typing import Any

import torch

from diffkd.core import guidance_kinds, interval
from diffkd.core.denoiser import Denoiser
from diffkd.core.derivative import directional
from diffkd.data.absent import TeacherDraws, Unseen
from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.methods.base import Method, Stage
from diffkd.methods.denoising import Denoising
from diffkd.metrics.evaluation.image_stream import guided_by
from diffkd.models import guidance_input, loading, students
from diffkd.models.students import lora
from diffkd.runs import pairs
from diffkd.runs.config import Distill
from diffkd.runs.method_config import method_name

Plan = list[tuple[Method, Stage]]


def plan(config: Distill, teacher: Denoiser) -> Plan:
    """The stages of every method, in order. Raises UserError where one does not fit what it follows."""
    plan: Plan = []
    student = config.student.build(teacher, config.seed)
    start = teacher
    teachers = {"original": teacher, "previous": teacher}  # and the students so far, by name
    for method in config.method:
        stages = method.stages(start)
        for number, stage in enumerate(stages):
            stage = _named(stage, method_name(method), teachers)
            plan.append((method, stage))
            own = _find(teachers, stage)  # which it learns from
            _check_teacher(stage, own, run=own is teacher)
            if _guides(stage) and own.guidance_range is None:
                own.check_guidance()
            if stage.pairs is not None:
                pairs.check(f"pairs of stage {stage.name}", stage.pairs, own)
            if number == 0:
                method.networks(own, student)
                _check_derivative(method, student)
            adding = adds_guidance(stage, student)
            for one in stage.students:
                start = student = students.with_network(student, student.network, stage.prediction)
                start.steps, start.sampler = one.steps, one.drawn
                start.worse = teacher.worse  # so that methods find what the run's teacher can be guided by
                start.guidance_range = stage.guidance_range or start.guidance_range
                start.label_dropout = label_dropout(method, start)
                teachers["previous"] = teachers[one.name] = start
                if one.steps is not None:
                    start.schedule.check_steps(one.steps, one.drawn)
            if stage.interval:
                interval.check(student.network)
            _check_guidance(stage, method, student)
            if adding:  # so that what follows can ask it
                lora.take_guidance(student.network, student.adapter)
            if own is not teacher:
                _check_plainly(stage, teacher)
    _check_pairs(plan)
    if config.teacher.guidance_kind is not None:
        drawn = config.data.guidance if isinstance(config.data, TeacherDraws) else None
        weights = [w for _, stage in plan for w in stage.guidance_range or (stage.guidance,)]
        config.teacher.guidance_kind.check_weights([*weights, drawn], "method.guidance")
    return plan


def _find(teachers: Mapping[str, Denoiser], stage: Stage) -> Denoiser:
    if stage.teacher not in teachers:
        raise UserError(
            f"stage {stage.name} is to learn from {stage.teacher!r}, which is no student before it; "
            f"method.teacher is one of {', '.join(teachers)}"
        )
    return teachers[stage.teacher]


def _named(stage: Stage, method: str, taken: Collection[str]) -> Stage:
    """The stage with names for its students that no other has: 1-steps, then 1-steps-dmd2, 1-steps-dmd2-2.

    Raises UserError where two of its own are the same.
    """
    own = f"-{method.rpartition('.')[2]}"
    for suffix in chain(("", own), (f"{own}-{n}" for n in count(2))):
        named = replace(stage, name=f"{stage.name}{suffix}")
        names = [one.name for one in named.students]
        if len({*names}) < len(names):
            raise UserError(f"method {method} has two students of the same number of steps; leave one out")
        if not {*taken}.intersection(names):
            return named
    raise AssertionError


def maker(plan: Plan, index: int) -> str:
    """What the teacher of a stage is called: the run's own, or the student that it is."""
    name = plan[index][1].teacher
    if name == "previous" and index:
        return plan[index - 1][1].name
    return pairs.TEACHER if name in ("original", "previous") else name


def taught(plan: Plan, index: int, teacher: Denoiser) -> dict[str, Any]:
    """What the card of a stage's students says of how they were taught. teacher: the run's own.

    guidance_baked_in: the stage's own weight; where that is 1, what the model that it learns from has baked
    in. guidance_kind: of that guidance, left out where it is the plain one. teacher_sampler: by which the
    teacher's steps, or its pairs, were taken; left out where it takes none.
    """
    stage = plan[index][1]
    sampler = stage.sampler if stage.pairs is None else stage.pairs.sampler
    return _baked_in(plan, index, teacher) | ({} if sampler is None else {"teacher_sampler": sampler})


def _baked_in(plan: Plan, index: int, teacher: Denoiser) -> dict[str, Any]:
    """guidance_baked_in and guidance_kind of `taught`."""
    stage = plan[index][1]
    if stage.guidance != 1:
        return {"guidance_baked_in": stage.guidance, **guided_by(teacher)}
    if stage.guidance_range is not None:
        return {"guidance_baked_in": teacher.guidance_baked_in, **guided_by(teacher)}
    made_by = maker(plan, index)
    stages = [number for number, (_, one) in enumerate(plan) if made_by in {x.name for x in one.students}]
    if stages:
        return _baked_in(plan, stages[0], teacher)
    kind = {"guidance_kind": teacher.taught_kind} if teacher.taught_kind else {}
    return {"guidance_baked_in": teacher.guidance_baked_in, **kind}


def _guides(stage: Stage) -> bool:
    """Whether its teacher is asked with guidance."""
    return stage.guidance != 1.0 or stage.guidance_range is not None


def weight(stage: Stage, teacher: Denoiser) -> float:
    """The guidance weight that a stage's student is compared with its teacher at."""
    if stage.guidance_range is None:
        return stage.guidance if stage.guidance != 1.0 else teacher.usual_guidance
    return with_range(teacher, stage.guidance_range).usual_guidance


def with_range(denoiser: Denoiser, guidance_range: tuple[float, float]) -> Denoiser:
    taking = students.with_network(denoiser, denoiser.network)
    taking.guidance_range = guidance_range
    return taking


def adds_guidance(stage: Stage, student: Denoiser) -> bool:
    """Whether a stage's student is to take its guidance weight as an input, which it does not yet."""
    return stage.guidance_range is not None and student.guidance_range is None


def label_dropout(method: Method, student: Denoiser) -> float | None:
    """What a student has after a method: where its teacher had none, the data's own loss teaches it."""
    before = student.label_dropout
    return method.label_dropout if before == 0 and isinstance(method, Denoising) else before


def _check_guidance(stage: Stage, method: Method, student: Denoiser) -> None:
    """Raises UserError where a student cannot take its guidance as an input, as this stage or one before it
    wants."""
    if stage.guidance_range is not None:
        guidance_input.check(student.network)
    if student.guidance_range is None:
        return
    if stage.guidance != 1.0:
        raise UserError(
            f"stage {stage.name} bakes in guidance {stage.guidance:g}, and its student takes the weight as "
            "an input; leave out method.guidance, or bake a teacher's own in beforehand (teacher.guidance)"
        )
    if stage.pairs is not None:
        raise UserError(
            f"stage {stage.name} learns from pairs, which are of one weight, and its student takes the "
            "weight as an input; bake one weight in for this method"
        )
    if {"fake", "heads"}.intersection(method.needs.networks):
        raise UserError(
            f"stage {stage.name} compares with networks that do not know the weight which its student takes "
            "as an input; bake one weight in for this method"
        )


def _check_derivative(method: Method, student: Denoiser) -> None:
    """Raises UserError where the method is to take an exact derivative and the network has none, such as an
    attention of another library: by one of a small image."""
    if getattr(method, "derivative", None) == "jvp":
        x_t, t, cond = loading.small_inputs(student)
        along = x_t, torch.ones_like(t)
        directional(lambda x, time: student.output(x, time, **cond), (x_t, t), along, "jvp")


def _check_plainly(stage: Stage, teacher: Denoiser) -> None:
    """Raises UserError where a stage guides a student, and the run's teacher is guided in another kind."""
    if _guides(stage) and guidance_kinds.described(teacher):
        raise UserError(
            f"stage {stage.name} guides a student before it, and teacher.guidance_kind is of the run's "
            "teacher alone; set method.teacher: original where the method has it, or leave one of the two out"
        )


def _check_pairs(plan: Plan) -> None:
    """Raises UserError where two stages want other pairs of one teacher, which are kept in one place."""
    recipes: dict[str, tuple[int, str, float]] = {}
    for index, (_, stage) in enumerate(plan):
        if stage.pairs is not None:
            recipe = stage.pairs.steps, stage.pairs.sampler, stage.guidance
            made_by = maker(plan, index)
            if recipes.setdefault(made_by, recipe) != recipe:
                raise UserError(
                    f"stage {stage.name} wants pairs of {made_by} by other steps, sampler or guidance than a "
                    "stage before; give both the same"
                )


def _check_teacher(stage: Stage, teacher: Denoiser, *, run: bool) -> None:
    """Raises UserError where a student of few steps is to teach at noise levels that it knows nothing of.

    One drawn by renoise may be a consistency model, whose trajectories begin at any.

    run: whether it is the run's own teacher.
    """
    if teacher.steps is None or stage.pairs is not None:
        return
    if run:
        who, instead = "the run's teacher", "take the model that it was made of for a teacher"
    else:
        who = "the student before it" if stage.teacher == "previous" else f"student {stage.teacher}"
        instead = "set method.teacher: original where the method has it"
    if stage.every_time:
        raise UserError(
            f"stage {stage.name} asks its teacher at every noise level, and {who} is a student of "
            f"{teacher.steps} steps, which knows no others; {instead}"
        )
    wanted = stage.substeps * (stage.steps or 0)
    if stage.sampler and wanted and teacher.sampler == "ddim" and wanted != teacher.steps:
        raise UserError(
            f"stage {stage.name} learns from {who}, which knows its own {teacher.steps} steps and no others; "
            f"let {stage.substeps} x {stage.steps} be these (method.substeps, method.steps), or {instead}"
        )


def check_fits(denoiser: Denoiser, images: Images | Unseen) -> None:
    """Raises UserError where the model does not take the data's images or labels."""
    if isinstance(images, Unseen):
        return  # made to fit
    if denoiser.codec is None and denoiser.shape != images.shape:
        raise UserError(
            f"the model makes images of {_size(denoiser.shape)} and the data has {_size(images.shape)} "
            "(channels x height x width); set data.size and data.channels to the model's"
        )
    if denoiser.codec is not None and denoiser.codec.image_channels < images.shape[0]:
        raise UserError(
            f"the model makes grey images and {images.name} has {images.shape[0]} channels; set "
            "data.channels to 1"
        )
    if denoiser.num_classes is None:
        return
    if images.labels is None:
        raise UserError(
            f"the model is class-conditional and {images.name} has no labels; provide class subfolders"
        )
    highest = int(images.labels.max())
    if highest >= denoiser.num_classes or int(images.labels.min()) < 0:
        raise UserError(
            f"label {highest} of {images.name} is out of range for a model of {denoiser.num_classes} classes"
        )


def _size(shape: tuple[int, int, int] | None) -> str:
    return "x".join(map(str, shape)) if shape else "unknown size"
