"""Models that work in latents, within a run: their data cached before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import derived_seed
from diffkd.data.absent import NoData, TeacherDraws, Unseen
from diffkd.data.bucketed_latents import BucketedLatents
from diffkd.data.buckets import BucketedImages
from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset
from diffkd.data.images import Images
from diffkd.data.latents import Conditions, LatentCache, UnseenLatents
from diffkd.errors import UserError
from diffkd.io import progress
from diffkd.io.text import counted, log
from diffkd.metrics.evaluation.image_sources import subset as chosen
from diffkd.runs import config_files
from diffkd.runs.config import Distill
from diffkd.training import launch

TOGETHER = 16  # latents that are drawn at once
Items = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def opened(config: Distill, *, latent: bool) -> Images | None:
    """A run's data: in memory, or for a model of latents, which encodes each image once, decoded when they
    are asked for. None where there are no images."""
    data = config.data
    if isinstance(data, TeacherDraws):
        return None
    if latent and isinstance(data, Folder | HubDataset):
        return data.open(_folder(config))
    return data.load()


def _folder(config: Distill) -> Path:
    return config.cache or config.out / "cache"


def cache(config: Distill, teacher: Denoiser, images: Images | Unseen) -> Conditions | None:
    """Where the data's latents and embeddings are kept, computed or not; None for a model of pixels.

    Raises UserError where the data does not fit the model.
    """
    if teacher.conditioner is None and isinstance(images, Unseen) and images.captions:
        raise UserError(
            f"data kind prompts is for models that draw from prompts, and {teacher.name} does not; use kind "
            "none"
        )
    if teacher.codec is None:
        if config.cache is not None:
            raise UserError(
                f"cache {config.cache} is for models of latents, and {teacher.name} makes pixels; leave it "
                "out"
            )
        return None
    unseen = isinstance(images, Unseen)
    if teacher.conditioner is not None and not any(images.captions):
        remedy = (
            'put a metadata.jsonl with {"file_name": ..., "text": ...} beside the images, or a .txt of the '
        )
        remedy += "same name beside each"
        if unseen:
            remedy = "use kind prompts, with a file of them"
        elif isinstance(config.data, HubDataset):
            remedy = "name its column of captions as data.text"
        name = "data kind none" if unseen else images.name
        raise UserError(f"{teacher.name} draws from prompts, and {name} has no captions; {remedy}")
    several = isinstance(images, BucketedImages)
    kind: Any = UnseenLatents if unseen else BucketedLatents if several else LatentCache
    found: Conditions = kind(_folder(config), images, teacher.codec, teacher.conditioner)
    fit(teacher, found)
    return found


def unseen(config: Distill, teacher: Denoiser) -> Unseen:
    """What stands for the images of data that has none, for this teacher."""
    assert isinstance(config.data, TeacherDraws)
    codec, shape = teacher.codec, teacher.shape
    if codec is not None and shape is not None:
        shape = (codec.image_channels, shape[1] * codec.factor, shape[2] * codec.factor)
    return config.data.of(shape, teacher.num_classes)


def fit(denoiser: Denoiser, cache: Conditions | None) -> Denoiser:
    """Gives it the shape of the cached latents, and what was made of no prompt once that is known."""
    if cache is not None:
        denoiser.fit(cache.shape)
        if not cache.left():
            denoiser.set_null(cache.null())
    return denoiser


@torch.no_grad()
def drawn(
    teacher: Denoiser,
    cache: Conditions,
    labels: Tensor | None,
    count: int,
    steps: int,
    guidance: float,
    seed: int,
) -> Iterator[Tensor]:
    """Latents (B, C, H, W) that a teacher draws for these labels (count,), or for the prompts of some
    examples, in batches."""
    generator = torch.Generator().manual_seed(derived_seed(seed, *b"drawn"))
    examples = chosen(len(cache), count)
    for part in torch.arange(count).split(TOGETHER):
        noise = torch.randn(len(part), *cache.shape, generator=generator).to(teacher.device)
        given = cache.asked(examples[part]) if labels is None else {"class_labels": labels[part]}
        cond: dict[str, Any] = {key: value.to(teacher.device) for key, value in given.items()}
        cond |= teacher.guided_by(guidance, len(part))
        yield samplers.sample(teacher, noise, steps, teacher.sampler, **cond)


def fill(cache: Conditions | None, accelerator: Accelerator, items: Items) -> int:
    """Computes what is missing, all processes together; how many captions and images that were. items: counts
    them for the user, as `Session.image_bar`, and may raise to stop."""
    if cache is None:
        return 0
    left = cache.left()
    accelerator.wait_for_everyone()  # before any file is written, so that all processes miss the same
    if left:
        rank, world = accelerator.process_index, accelerator.num_processes
        for part in (cache.codec, cache.conditioner):
            if part is not None:
                part.to(accelerator.device)
        without = sum(not caption for caption in cache.images.captions)
        if without and accelerator.is_main_process:
            log.warning(
                "%s: %d of %s have no caption, and the empty prompt in its place", cache.images.name, without,
                counted(len(cache.images.captions), "image"),
            )  # fmt: skip
        for kept in cache.kept():
            if kept.alone() and accelerator.is_main_process:
                log.warning(
                    "%s holds %s of other encoders or data; these are computed anew, beside them",
                    cache.folder, kept.what,
                )  # fmt: skip
        with items("latents and embeddings", left) as on_items:
            cache.fill(rank, world, accelerator.wait_for_everyone, on_items)
    cache.check()
    return left


def fill_alone(config: Distill, console: Console) -> None:
    """`diffkd cache`: computes what a run would compute before it trains, and ends. Raises UserError where
    the config is of a model of pixels."""
    accelerator = launch.make_accelerator(config.training)
    if isinstance(config.data, NoData):
        raise UserError("data kind none has nothing to compute beforehand; run diffkd distill at once")
    source = config.teacher
    if source.train is not None:
        folder = config_files.load_train(source.train).out / "teacher"
        if not folder.exists():
            raise UserError(f"the teacher is not there yet; run diffkd train {source.train} first")
        source = source.model_copy(update={"path": str(folder), "train": None})
    teacher = source.load()
    images = opened(config, latent=teacher.codec is not None) or unseen(config, teacher)
    found = cache(config, teacher, images)
    if found is None:
        raise UserError(
            f"{teacher.name} makes pixels, of which there is nothing to compute beforehand; distil it at once"
        )

    @contextmanager
    def items(title: str, total: int) -> Iterator[Callable[[int], None]]:
        shown = accelerator.is_main_process
        with progress.bar(console, title, total, unit="images", shown=shown) as advance:
            yield progress.counter(advance, accelerator.num_processes)

    made = fill(found, accelerator, items)
    if accelerator.is_main_process:
        what = f"{made:,} captions and images computed" if made else "nothing was missing"
        progress.say(console, f"{what}: {found.folder}")
