"""Models that work in latents, within a run: their data cached before anything is trained."""

from __future__ import annotations

from diffkd.core.denoiser import Denoiser
from diffkd.data.absent import Unseen
from diffkd.data.images import Images
from diffkd.data.latents import LatentCache
from diffkd.errors import UserError
from diffkd.runs.config import Distill
from diffkd.runs.session import Session


def cache(config: Distill, teacher: Denoiser, images: Images | Unseen) -> LatentCache | None:
    """Where the data's latents and embeddings are kept, computed or not; None for a model of pixels.

    Raises UserError where the data does not fit the model, and where the folder holds another cache.
    """
    if teacher.codec is None:
        if config.cache is not None:
            raise UserError(f"cache {config.cache} is for models of latents, and {teacher.name} makes pixels")
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
        if not any(cache.missing()):
            denoiser.set_null(cache.null())
    return denoiser


def fill(session: Session, cache: LatentCache | None) -> None:
    """Computes what is missing, all processes together. Raises Interrupted to stop the run."""
    if cache is None:
        return
    embeddings, latents = cache.missing()
    parts = ((cache.embeddings, embeddings), (cache.latents, latents))
    left = sum(len(shards.ranges()[number]) for shards, numbers in parts if shards for number in numbers)
    if not left:
        return
    accelerator = session.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    for part in (cache.codec, cache.conditioner):
        if part is not None:
            part.to(accelerator.device)
    with session.image_bar("latents and embeddings", left) as on_items:
        cache.fill(rank, world, accelerator.wait_for_everyone, on_items)
