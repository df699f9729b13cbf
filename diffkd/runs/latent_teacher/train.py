"""`diffkd train` of a latent model: its autoencoder, then all that denoises together."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from rich.console import Console

from diffkd.core.autoencoder import ImageAutoencoder
from diffkd.core.conditioning import Conditioner
from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import derived_seed
from diffkd.data.images import Images
from diffkd.data.latents import LatentCache
from diffkd.metrics.evaluation.image_stream import prompts_for
from diffkd.models import loading
from diffkd.models.codecs import Autoencoder
from diffkd.models.new import NewPipeline
from diffkd.models.source import Source
from diffkd.runs import announcement, latents
from diffkd.runs.artifacts import RunArtifacts
from diffkd.runs.latent_teacher.config import TrainLatent
from diffkd.runs.reports import card_head, model_card
from diffkd.runs.session import ResumeOptions, Session, open_run
from diffkd.training import launch

ENCODED = 1024  # images that the scale of the latents is taken from


def train(config: TrainLatent, console: Console, options: ResumeOptions = ResumeOptions()) -> Path:
    """Trains a teacher, or resumes its training; the folder of its pipeline."""
    images, model = config.data.load(), _new(config)
    model.check(images)
    accelerator = launch.make_accelerator(config.training)
    conditioner = model.conditioner(images)
    folder, inputs = config.out / "teacher", dict[str, str]()
    if conditioner is not None:
        inputs["captions"] = hashlib.sha256("\0".join(images.captions).encode()).hexdigest()
    with open_run(config, accelerator, images, console, options, inputs) as session:
        artifacts = RunArtifacts(session, config, images, guidance=config.guidance)
        session.say(announcement.data(images))
        if folder.exists():
            session.update += config.autoencoding.updates + config.denoising.updates
        else:
            codec = _autoencoder(session, config, images)
            denoiser = _denoiser(session, config, images, codec, conditioner)
            _export(session, config, images, codec, denoiser, conditioner, folder)
            del denoiser
        teacher = loading.load(folder, device=accelerator.device)
        for count in artifacts.teacher_steps(teacher):
            artifacts.measure("teacher", "teacher", teacher, count, folder, guidance=config.guidance)
        steps = max(artifacts.teacher_steps(teacher))
        artifacts.preview(f"teacher-{steps}-steps", teacher, steps, config.guidance)
        artifacts.finish()
    return folder


def _new(config: TrainLatent) -> NewPipeline:
    model: NewPipeline = config.model
    return model


def _autoencoder(session: Session, config: TrainLatent, images: Images) -> Autoencoder:
    """The first stage: the trained autoencoder, as the codec of its own folder."""
    place = config.out / "autoencoder"
    if place.exists():
        session.update += config.autoencoding.updates
    else:
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(config.seed, *b"autoencoder"))
            vae = _new(config).autoencoder.build(images.shape)
        student = ImageAutoencoder(vae.to(session.accelerator.device).train())
        method = config.autoencoding
        session.run_stage(method, method.stages(student)[0], {"student": student}, images, 0)
        trained: Any = student.network
        vae = trained.vae.eval()
        mean, spread = _moments(vae, images)
        shift = {"shift_factor": mean} if _new(config).shifted else {}
        vae.register_to_config(scaling_factor=1 / spread, **shift)

        def write(folder: Path) -> None:
            vae.save_pretrained(folder / "vae", safe_serialization=True)

        session.export(place, write)
    source = Source(place, str(place), {"vae": ["diffusers", "AutoencoderKL"]})
    return Autoencoder(source, shifted=_new(config).shifted)


@torch.no_grad()
def _moments(vae: AutoencoderKL, images: Images) -> tuple[float, float]:
    """Mean and standard deviation of the latents' numbers, by which they are divided (Rombach et al. 2022,
    G)."""
    x0 = images.uint8(slice(0, min(ENCODED, len(images)))).float() / 127.5 - 1
    parts = [vae.encode(part.to(vae.device)).latent_dist.mean.cpu() for part in x0.split(64)]
    latents = torch.cat(parts)
    return float(latents.mean()), float(latents.std())


def _denoiser(
    session: Session,
    config: TrainLatent,
    images: Images,
    codec: Autoencoder,
    conditioner: Conditioner | None,
) -> Denoiser:
    """The second stage: all that learns on the latents."""
    cache = LatentCache(config.out / "cache", images, codec, conditioner)
    latents.fill(cache, session.accelerator, session.image_bar)
    schedule = config.schedule.build()
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(config.seed))
        denoiser = _new(config).build(cache.shape, images, conditioner, schedule, config.prediction)
    denoiser.to(session.accelerator.device)
    method = config.denoising
    session.run_stage(method, method.stages(denoiser)[0], {"student": denoiser}, cache, 1)
    return denoiser.eval()


def _export(
    session: Session,
    config: TrainLatent,
    images: Images,
    codec: Autoencoder,
    denoiser: Denoiser,
    conditioner: Conditioner | None,
    folder: Path,
) -> None:
    """The whole pipeline, with its model card."""

    def write(place: Path) -> None:
        _new(config).save(denoiser, codec, conditioner, images, place)
        made = loading.load(place)
        classes = {"classes": images.classes, "class_counts": images.class_counts}
        named: dict[str, Any] = {} if made.num_classes is None else classes
        made.label_dropout = config.denoising.label_dropout
        prompts = prompts_for(made, images.captions, max(1, config.pictures))
        named |= card_head.prompt_to_try(prompts or [])
        model_card.write(place, model_card.describe(made, data=images.name, **named))

    session.export(folder, write)
    codec.close()
