"""`diffkd distill`: students from a teacher, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from diffkd.core import interval
from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import generator_for
from diffkd.data.absent import TeacherDraws, Unseen
from diffkd.data.images import Examples, Images
from diffkd.data.latents import Conditions
from diffkd.data.pairs import DrawnImages, PairCache
from diffkd.generation import asked
from diffkd.generation.generator import generate
from diffkd.methods.base import Method, Stage
from diffkd.models import loading, students
from diffkd.models.students import lora
from diffkd.runs import announcement, config_files, latents, pairs, plans
from diffkd.runs.artifacts import RunArtifacts
from diffkd.runs.callbacks import Given
from diffkd.runs.config import Distill, Train
from diffkd.runs.latent_teacher.train import train as train_latent
from diffkd.runs.method_config import method_name
from diffkd.runs.opened import Opened
from diffkd.runs.reports import model_card
from diffkd.runs.session import ResumeOptions, Session, check_run, identity, open_run
from diffkd.runs.spread import SpreadWatch
from diffkd.runs.train import train, untrained_teacher
from diffkd.training import launch

IMPORTANCE_BATCHES = 8  # that the importance of channels by gradients is summed over


def distill(
    config: Distill,
    console: Console,
    options: ResumeOptions = ResumeOptions(),
    callbacks: Sequence[Given] = (),
) -> Path:
    """Distils the teacher stage by stage, or resumes that; the folder of the last student. callbacks: of this
    run, not of the training of its teacher."""
    images: Images | Unseen | None
    accelerator = launch.make_accelerator(config.training)
    source, teacher_run = config.teacher, None
    if source.train is None:
        teacher = source.load()
        images = latents.opened(config, latent=teacher.codec is not None)
    else:
        found = config_files.load_train(source.train)
        images = latents.opened(config, latent=not isinstance(found, Train))
        source = source.model_copy(update={"path": str(found.out / "teacher"), "train": None})
        if isinstance(found, Train):
            teacher_run = found
            teacher = untrained_teacher(found, found.data.load())  # enough to check the rest against
            source.guide(teacher)
        else:  # whose autoencoder and encoders are needed for that
            check_run(config, accelerator, options)
            train_latent(found, console, options)
            teacher = source.load()
    if images is None:
        images = latents.unseen(config, teacher)
    cached = latents.cache(config, teacher, images)
    plans.check_fits(teacher, images)
    plan = plans.plan(config, teacher)
    config.check(accelerator)
    if teacher_run is not None:
        check_run(config, accelerator, options)
        train(teacher_run, console, options)
        teacher = latents.fit(source.load(), cached)
    for index, (_, stage) in enumerate(plan):
        if stage.pairs is not None and plans.maker(plan, index) == pairs.TEACHER:
            _pairs_of(config, stage, teacher, images, pairs.TEACHER, cached)  # or refuses, now
    guidance = max((plans.weight(stage, teacher) for _, stage in plan), key=lambda w: abs(w - 1))
    drawn = _draws(config, teacher, images, guidance, cached)
    inputs = {"teacher": identity(teacher)}
    if cached is not None and cached.prompts:
        inputs["captions"] = cached.prompts
    with open_run(config, accelerator, images, console, options, inputs, callbacks) as session:
        latents.fill(cached, accelerator, session.image_bar)
        opened = Opened(config, source, cached, accelerator.device)
        teacher = opened.begin(teacher)
        readable = images if cached is None else cached.readable_images()
        artifacts = RunArtifacts(session, config, readable, source, guidance)
        session.say(announcement.data(images))
        if drawn is not None:
            recipe = drawn.pairs.recipe
            session.say(announcement.draws(len(drawn), recipe.steps, recipe.guidance))
        session.say(announcement.teacher(teacher, str(source.path), images))
        session.say(announcement.students([(method_name(method), stage) for method, stage in plan]))
        artifacts.announce_measuring(teacher)
        if drawn is not None:
            pairs.draw(session, drawn.pairs, teacher, "the teacher's images")
        examples: Examples = next(found for found in (drawn, cached, images) if found is not None)
        artifacts.teacher_curve(teacher)
        place = config.out / "students"
        _check_exported([place / one.name for _, stage in plan for one in stage.students])
        watch = _spread_watch(session, config, images, cached, opened, teacher, artifacts)
        taught = [plans.taught(plan, index, teacher) for index in range(len(plan))]
        current = teacher
        del teacher  # from the second stage on it is in memory only while it is sampled
        for index, (method, stage) in enumerate(plan):
            folder = place / stage.name
            if all((place / one.name).exists() for one in stage.students):
                session.update += stage.updates
            else:
                student = students.copy_of(current) if index else _first_student(config, current, examples)
                if index and (made_by := plans.maker(plan, index)) != plan[index - 1][1].name:
                    own = made_by == pairs.TEACHER
                    current = opened.teacher() if own else opened.student(place / made_by)
                artifacts.announce_size(current, student, stage)
                artifacts.forecast([stage for _, stage in plan[index:]])
                given = examples
                if stage.pairs is not None:
                    given = _pairs_of(config, stage, current, images, plans.maker(plan, index), cached)
                    pairs.draw(session, given, current, f"pairs for {stage.name}")
                nets = {"teacher": current, "student": student}
                _train(session, method, stage, nets, given, index, watch)
                if session.main:
                    student = opened.as_exported(student)
                for one in stage.students:
                    artifacts.export(
                        _as_drawn(student, one, main=session.main), place / one.name,
                        teacher=str(source.path), method=type(method).__name__,
                        config=config_files.resolved(config), stage=stage.name, classes=images.classes,
                        class_counts=images.class_counts, **model_card.of_merged(student), **taught[index],
                    )  # fmt: skip
                del student
            for one in stage.students:
                current = opened.student(place / one.name)
                drawn_by = students.merged(current)
                steps = current.steps or max(artifacts.teacher_steps(current))
                artifacts.measure(one.name, "student", drawn_by, steps, place / one.name)
                artifacts.preview(one.name, drawn_by, steps)
                artifacts.announce_stage(one, steps)
        artifacts.finish()
    return folder


def _pairs_of(
    config: Distill,
    stage: Stage,
    teacher: Denoiser,
    images: Images | Unseen,
    maker: str,
    cached: Conditions | None,
) -> PairCache:
    """Where a stage's pairs are kept. maker: its teacher's name in this run."""
    assert stage.pairs is not None
    counts = images.class_counts
    return pairs.cache(config, stage.pairs, stage.guidance, teacher, counts, maker, cached)


def _draws(
    config: Distill, teacher: Denoiser, images: Images | Unseen, guidance: float, cached: Conditions | None
) -> DrawnImages | None:
    """What the teacher draws in place of a dataset, drawn or not; None where no method learns from it.
    guidance: where the config does not say it. Raises UserError where it cannot be drawn so."""
    data = config.data
    if not isinstance(data, TeacherDraws) or not any(method.learns_from_data() for method in config.method):
        return None
    wanted = pairs.of_data(data)
    pairs.check("data.draws", wanted, teacher, "data.steps to these, or give the data")
    if data.guidance is not None:
        guidance = data.guidance
    if teacher.guidance_range is not None:
        asked.say_range(teacher, guidance)
    elif guidance != 1.0:
        teacher.check_guidance()
    asked.say_what_it_was_made_for(teacher, wanted.steps, wanted.sampler, guidance)
    counts = images.class_counts
    return DrawnImages(pairs.cache(config, wanted, guidance, teacher, counts, pairs.DATA, cached))


def _check_exported(folders: Sequence[Path]) -> None:
    """Raises UserError where a student beyond the first that is to be trained cannot be loaded: one that was
    made before, and changed since."""
    for folder in dropwhile(Path.exists, folders):
        if folder.exists():
            loading.load(folder)


def _spread_watch(
    session: Session,
    config: Distill,
    images: Images | Unseen,
    cached: Conditions | None,
    opened: Opened,
    teacher: Denoiser,
    artifacts: RunArtifacts,
) -> SpreadWatch | None:
    if config.spread_every is None:
        return None
    steps, guidance = teacher.steps or max(artifacts.teacher_steps(teacher)), artifacts.guidance

    def drawn(count: int, labels: Tensor | None) -> Iterator[Tensor]:
        options: dict[str, Any] = {} if guidance == 1.0 else {"guidance": guidance}
        again = opened.teacher()
        if cached is not None:
            return latents.drawn(again, cached, labels, count, steps, guidance, config.seed)
        return generate(again, count, steps=steps, seed=config.seed, labels=labels, **options)

    conditional = teacher.num_classes is not None
    return SpreadWatch(session, config.spread_every, config.evaluation, conditional, images, drawn, cached)


def _first_student(config: Distill, teacher: Denoiser, examples: Examples) -> Denoiser:
    """The first stage's student, before it is trained."""
    rng = generator_for((config.seed, 0, 0), 0)

    def batches() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for _ in range(IMPORTANCE_BATCHES):
            x0, cond = examples.batch(config.training.batch_size, rng)[:2]
            yield x0, {} if teacher.num_classes is None and teacher.conditioner is None else cond

    return config.student.build(teacher, config.seed, batches())


def _train(
    session: Session,
    method: Method,
    stage: Stage,
    nets: dict[str, Denoiser],
    examples: Examples,
    index: int,
    watch: SpreadWatch | None,
) -> None:
    """Trains nets["student"] in place. The teacher must not be used for anything else afterwards."""
    trained = networks_of(method, stage, nets["teacher"], nets["student"])
    look = watch.of_stage(stage, index, nets["student"]) if watch else None
    session.run_stage(method, stage, trained, examples, index, look=look)


def networks_of(method: Method, stage: Stage, teacher: Denoiser, student: Denoiser) -> dict[str, Any]:
    """All networks of a stage by name, these two made ready for it in place and the method's own made."""
    teacher.requires_grad_(False)
    student.requires_grad_(True)
    if stage.prediction is not None:
        student.prediction = stage.prediction
    student.steps, student.sampler, student.clip = stage.steps, stage.drawn, None  # targets are not clipped
    student.label_dropout = plans.label_dropout(method, student)
    if stage.interval:
        interval.attach(student.network)
    if plans.adds_guidance(stage, student):
        lora.take_guidance(student.network, student.adapter)
        student.guidance_range = stage.guidance_range
    return {"teacher": teacher, "student": student, **method.networks(teacher, student)}


def _as_drawn(student: Denoiser, stage: Stage, *, main: bool) -> Denoiser:
    """A trained student as its pipeline has it: of the stage's steps, whose length is folded in if it took it
    as an input; whole where an adapter is not all that learned. main: whether this process has all of its
    weights."""
    if student.adapter is not None and lora.is_more(student.network):
        student = students.merged(student)
    network = student.network
    if stage.interval and main:
        assert stage.steps is not None
        network = interval.folded(network, 1 / stage.steps)
    drawn = students.with_network(student, network)
    drawn.steps = stage.steps
    return drawn
