"""`diffkd train` of a text-to-image model: its autoencoder, then UNet and text encoder together."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from rich.console import Console

from diffkd.core.autoencoder import ImageAutoencoder
from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import derived_seed
from diffkd.core.schedules import to_diffusers
from diffkd.data.images import Images
from diffkd.data.latents import LatentCache
from diffkd.errors import UserError
from diffkd.models import loading
from diffkd.models.codecs import Autoencoder
from diffkd.models.source import Source
from diffkd.models.text_to_image import Tokens, called, learn_tokenizer
from diffkd.models.transformers_models import silent
from diffkd.runs import announcement, latents
from diffkd.runs.artifacts import RunArtifacts
from diffkd.runs.reports import model_card
from diffkd.runs.session import ResumeOptions, Session, open_run
from diffkd.runs.text_to_image.config import TrainTextToImage
from diffkd.training import launch

ENCODED = 1024  # images that the scale of the latents is taken from


def train(config: TrainTextToImage, console: Console, options: ResumeOptions = ResumeOptions()) -> Path:
    """Trains a teacher, or resumes its training; the folder of its pipeline."""
    images = config.data.load()
    if not any(images.captions):
        raise UserError(
            f"{images.name} has no captions, from which a text-to-image model learns; give data with "
            "captions, or leave out model.kind"
        )
    if images.shape[0] != 3:
        raise UserError(
            f"{images.name} is grey, and a text-to-image model makes colours; set data.channels to 3"
        )
    accelerator = launch.make_accelerator(config.training)
    tokenizer = learn_tokenizer(images.captions, config.model.text)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(config.seed, *b"autoencoder"))
        vae = config.model.autoencoder.build(images.shape)  # refuses sizes that do not divide
    folder = config.out / "teacher"
    inputs = {"captions": hashlib.sha256("\0".join(images.captions).encode()).hexdigest()}
    with open_run(config, accelerator, images, console, options, inputs) as session:
        artifacts = RunArtifacts(session, config, images, guidance=config.guidance)
        session.say(announcement.data(images))
        if not folder.exists():
            codec = _autoencoder(session, config, images, vae)
            denoiser = _denoiser(session, config, images, codec, tokenizer)
            _export(session, config, images, codec, denoiser, tokenizer, folder)
            del denoiser
        teacher = loading.load(folder, device=accelerator.device)
        for count in artifacts.teacher_steps(teacher):
            artifacts.measure("teacher", "teacher", teacher, count, folder, guidance=config.guidance)
        steps = max(artifacts.teacher_steps(teacher))
        artifacts.preview(f"teacher-{steps}-steps", teacher, steps, config.guidance)
        artifacts.finish()
    return folder


def _autoencoder(
    session: Session, config: TrainTextToImage, images: Images, vae: AutoencoderKL
) -> Autoencoder:
    """The first stage: the trained autoencoder, as the codec of its own folder."""
    place = config.out / "autoencoder"
    if not place.exists():
        student = ImageAutoencoder(vae.to(session.accelerator.device).train())
        method = config.autoencoding
        session.run_stage(method, method.stages(student)[0], {"student": student}, images, 0)
        trained: Any = student.network
        vae = trained.vae.eval()
        vae.register_to_config(scaling_factor=1 / _spread(vae, images))

        def write(folder: Path) -> None:
            vae.save_pretrained(folder / "vae", safe_serialization=True)

        session.export(place, write)
    return Autoencoder(Source(place, str(place), {"vae": ["diffusers", "AutoencoderKL"]}))


@torch.no_grad()
def _spread(vae: AutoencoderKL, images: Images) -> float:
    """The standard deviation of the latents' numbers, by which they are divided (Rombach et al. 2022, G)."""
    x0 = images.uint8(slice(0, min(ENCODED, len(images)))).float() / 127.5 - 1
    parts = [vae.encode(part.to(vae.device)).latent_dist.mean.cpu() for part in x0.split(64)]
    return float(torch.cat(parts).std())


def _denoiser(
    session: Session, config: TrainTextToImage, images: Images, codec: Autoencoder, tokenizer: Any
) -> Denoiser:
    """The second stage: UNet and text encoder, as a denoiser of latents that takes tokens."""
    tokens = Tokens(tokenizer, config.model.text.length)
    cache = LatentCache(config.out / "cache", images, codec, tokens)
    latents.fill(cache, session.accelerator, session.image_bar)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(config.seed))
        network = config.model.build(cache.shape, tokenizer)
    denoiser = Denoiser(
        network, config.schedule.build(), config.prediction, shape=cache.shape, call=called,
        example=tokens.example,
    )  # fmt: skip
    denoiser.to(session.accelerator.device).train().set_null(tokens.null())
    method = config.denoising
    session.run_stage(method, method.stages(denoiser)[0], {"student": denoiser}, cache, 1)
    denoiser.eval()
    return denoiser


def _export(
    session: Session,
    config: TrainTextToImage,
    images: Images,
    codec: Autoencoder,
    denoiser: Denoiser,
    tokenizer: Any,
    folder: Path,
) -> None:
    """The whole pipeline, with its model card."""
    network: Any = denoiser.network

    def write(place: Path) -> None:
        with silent():  # what diffusers imports for it warns of parts that are not used
            from diffusers import StableDiffusionPipeline

        scheduler = to_diffusers(denoiser.schedule, denoiser.prediction)
        scheduler.register_to_config(steps_offset=1)  # which a trailing grid ignores, and else stock warns
        pipeline = StableDiffusionPipeline(
            vae=codec.network.cpu(), text_encoder=network.text_encoder.cpu(), tokenizer=tokenizer,
            unet=network.unet.cpu(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        with silent():
            pipeline.save_pretrained(place, safe_serialization=True)
        made = loading.load(place)
        model_card.write(place, model_card.describe(made, data=images.name))

    session.export(folder, write)
    codec.close()
