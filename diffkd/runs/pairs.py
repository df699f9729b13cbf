"""Pairs of noises and what a teacher makes of them, drawn before the stage that learns from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import derived_seed
from diffkd.data.absent import TeacherDraws
from diffkd.data.latents import Conditions
from diffkd.data.pairs import PairCache, Recipe
from diffkd.errors import UserError
from diffkd.generation.labels import proportional
from diffkd.generation.pixels import check_finite
from diffkd.methods.base import Pairs
from diffkd.runs.config import Distill
from diffkd.runs.session import Session, identity

TEACHER, DATA = "teacher", "data"  # whose pairs they are: the run's own teacher's, or what stands for images


def of_data(data: TeacherDraws) -> Pairs:
    """What the teacher draws in place of a dataset."""
    return Pairs(data.count(), data.steps, data.sampler)


def check(
    what: str,
    pairs: Pairs,
    teacher: Denoiser,
    remedy: str = "method.pair_steps and method.sampler to these, or method.teacher: original",
) -> None:
    """Raises UserError where pairs cannot be drawn of this teacher. what: whose they are, for the message;
    remedy: what to set where the teacher is a student itself."""
    if samplers.fresh_noises(pairs.sampler, pairs.steps):
        raise UserError(
            f"{what} are by {pairs.sampler}, which adds noise of its own, so that the first noise does not "
            "determine the image; use ddim, heun or dpmpp_2m"
        )
    if pairs.steps > teacher.schedule.num_train_timesteps:
        raise UserError(
            f"{what} in {pairs.steps} steps are more than the teacher's "
            f"{teacher.schedule.num_train_timesteps} time steps; use fewer"
        )
    own = teacher.steps, teacher.sampler
    if teacher.steps is not None and (pairs.steps, pairs.sampler) != own:
        raise UserError(
            f"{what} are in {pairs.steps} steps of {pairs.sampler}, of a teacher that is itself a student of "
            f"{teacher.steps} steps of {teacher.sampler} and draws in no others; set {remedy}"
        )


def cache(
    config: Distill,
    pairs: Pairs,
    guidance: float,
    teacher: Denoiser,
    class_counts: Sequence[int],
    name: str,
    latents: Conditions | None = None,
) -> PairCache:
    """Where pairs are kept, drawn or not.

    guidance: that they are drawn with. class_counts: in whose proportion the classes are drawn. latents: of a
    model of prompts, pair i is of the prompt of example i, modulo their number. name: of their folder, which
    with the run's seed decides their noise: never that of images which are measured. What the run's teacher
    draws may be shared with other runs, what a student does is the run's own. Raises UserError where the
    folder holds others.
    """
    assert teacher.shape is not None
    recipe = Recipe(
        identity(teacher), pairs.sampler, pairs.steps, guidance,
        seed=derived_seed(config.seed, *b"pairs", *name.encode()) >> 1,
        classes=[] if teacher.num_classes is None else [*class_counts], shape=teacher.shape,
        prompts="" if latents is None else latents.prompts,
    )  # fmt: skip
    shared = config.pairs if name in (TEACHER, DATA) else None
    folder = (shared or config.out / "pairs") / name
    if latents is None or latents.embeddings is None:
        return PairCache(folder, recipe, pairs.count)
    return PairCache(folder, recipe, pairs.count, latents.asked)


def draw(session: Session, cache: PairCache, teacher: Denoiser, what: str) -> None:
    """Draws the pairs that are not there, each process its share. what: they are, for the user. Raises
    Interrupted to stop the run."""
    accelerator = session.accelerator
    shards, missing = cache.shards(), cache.missing()
    if session.main:
        cache.begin()
    accelerator.wait_for_everyone()  # before any is written, so that all processes miss the same
    left = sum(len(shards[number]) for number in missing)
    if not left:
        return
    batch = max(1, session.training.batch_size // accelerator.num_processes)
    with session.image_bar(what, left) as on_images:
        for number in missing[accelerator.process_index :: accelerator.num_processes]:
            labels, parts = _labels(cache.recipe, shards[number]), []
            for part in torch.arange(len(shards[number])).split(batch):
                chosen = None if labels is None else labels[part]
                parts.append(_images(teacher, cache, part + shards[number].start, chosen))
                on_images(len(part))
            cache.write(number, torch.cat(parts), labels)
    accelerator.wait_for_everyone()
    assert not cache.missing()


def _labels(recipe: Recipe, numbers: range) -> Tensor | None:
    """Those of these pairs, which do not depend on how many there are."""
    return proportional(recipe.classes, numbers.stop)[numbers.start :] if recipe.classes else None


@torch.no_grad()
def _images(teacher: Denoiser, cache: PairCache, indices: Tensor, labels: Tensor | None) -> Tensor:
    """What the teacher draws of these noises, on the host. Raises UserError for values beyond all numbers."""
    recipe = cache.recipe
    given = {**cache.cond(indices), **({} if labels is None else {"class_labels": labels})}
    cond: dict[str, Any] = {key: value.to(teacher.device) for key, value in given.items()}
    noise = cache.noise(indices.tolist()).to(teacher.device)
    cond |= teacher.guided_by(recipe.guidance, len(noise))
    x0 = samplers.sample(teacher, noise, recipe.steps, recipe.sampler, **cond)
    check_finite(x0.isfinite().all())
    return x0.float().cpu()
