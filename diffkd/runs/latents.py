"""Models that work in latents, within a run: their data cached before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from accelerate import Accelerator
from rich.console import Console

from diffkd.core.denoiser import Denoiser
from diffkd.data.absent import NoData, Unseen
from diffkd.data.images import Images
from diffkd.data.latents import LatentCache
from diffkd.errors import UserError
from diffkd.io import progress
from diffkd.runs import config_files
from diffkd.runs.config import Distill
from diffkd.training import launch

Items = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def cache(config: Distill, teacher: Denoiser, images: Images | Unseen) -> LatentCache | None:
    """Where the data's latents and embeddings are kept, computed or not; None for a model of pixels.

    Raises UserError where the data does not fit the model, and where the folder holds another cache.
    """
    if teacher.codec is None:
        if config.cache is not None:
            raise UserError(
                f"cache {config.cache} is for models of latents, and {teacher.name} makes pixels; leave it "
                "out"
            )
        return None
    if isinstance(images, Unseen):
        raise UserError(
            f"data kind none is for models of pixels, and {teacher.name} takes latents; name the data"
        )
    if teacher.conditioner is not None and not any(images.captions):
        raise UserError(
            f"{teacher.name} draws from prompts, and {images.name} has no captions; put a metadata.jsonl "
            'with {"file_name": ..., "text": ...} beside the images, or a .txt of the same name beside each'
        )
    found = LatentCache(config.cache or config.out / "cache", images, teacher.codec, teacher.conditioner)
    fit(teacher, found)
    return found


def fit(denoiser: Denoiser, cache: LatentCache | None) -> Denoiser:
    """Gives it the shape of the cached latents, and what was made of no prompt once that is known."""
    if cache is not None:
        denoiser.shape = cache.shape
        if not cache.left():
            denoiser.set_null(cache.null())
    return denoiser


def fill(cache: LatentCache | None, accelerator: Accelerator, items: Items) -> int:
    """Computes what is missing, all processes together; how many captions and images that were. items: counts
    them for the user, as `Session.image_bar`, and may raise to stop."""
    if cache is None:
        return 0
    left = cache.left()
    if left:
        rank, world = accelerator.process_index, accelerator.num_processes
        for part in (cache.codec, cache.conditioner):
            if part is not None:
                part.to(accelerator.device)
        with items("latents and embeddings", left) as on_items:
            cache.fill(rank, world, accelerator.wait_for_everyone, on_items)
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
    found = cache(config, teacher, config.data.load())
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
