"""What holds for every method: checks that take one, for the conformance test and for methods of your own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from diffkd.core import interval
from diffkd.core.classifier import Classifier
from diffkd.core.denoiser import GUIDANCE
from diffkd.core.schedules import Schedule
from diffkd.data.absent import Unseen
from diffkd.data.images import Examples, Images
from diffkd.errors import Interrupted
from diffkd.methods.base import Batch, Loss, Method, Stage, Step
from diffkd.models import guidance_input, students
from diffkd.runs.classification.cnn import CNN
from diffkd.training.config import Training
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage
from tests.tiny import student

COSINE = Schedule.cosine(64)
MEASURED = ("images_per_second", "cpu_seconds_per_update", "peak_memory_gb")


def images(count: int = 64) -> Images:
    """Noise in three classes, (1, 8, 8)."""
    generator = torch.Generator().manual_seed(9)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8).numpy()
    return Images("noise", pixels, torch.arange(count) % 3, ["a", "b", "c"])


class Paired:
    """Images with a noise for each: for stages of pairs."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def indices(self, size: int, rng: torch.Generator) -> torch.Tensor:
        return self.images.indices(size, rng)

    def batch(
        self, size: int, rng: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        x0, cond = self.images.batch(size, rng)
        return x0, cond, torch.randn(x0.shape, generator=rng)


def examples(method: Method, stage: Stage) -> Examples:
    """What the stage learns from: images, none where the method needs none, or pairs."""
    if stage.pairs is not None:
        return Paired(images())
    return images() if method.learns_from_data() else Unseen((1, 8, 8), [1, 1, 1])


def nets_of(method: Method) -> dict[str, Any]:
    """A teacher, a student that differs from it, and the method's own networks; the same ones every time. The
    student takes the length of a step where the method's stages say so."""
    if method.kind is Classifier:
        torch.manual_seed(3)
        networks = [CNN(1, 3, channels, timed=False) for channels in ([8, 8], [4])]
        teacher, pupil = (Classifier(network, 3, shape=(1, 8, 8)) for network in networks)
    else:
        teacher = student(4, "v_prediction", COSINE, sampler="renoise", seed=1)
        teacher.num_classes, teacher.null_label = 3, 3
        if method_range := method.stages(teacher)[0].guidance_range:
            teacher.network = with_place_for_guidance()
        pupil = students.copy_of(teacher)
        if any(stage.interval for stage in method.stages(teacher)):
            interval.attach(pupil.network)
        if method_range:
            teacher.call = pupil.call = called_with_guidance
            guidance_input.attach(pupil.network, 8)
            pupil.guidance_range = method_range
        generator = torch.Generator().manual_seed(2)
        for parameter in pupil.network.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    teacher.requires_grad_(False)
    pupil.requires_grad_(True)
    more = method.networks(teacher, pupil)
    generator = torch.Generator().manual_seed(4)
    for parameter in [p for net in more.values() for p in net.parameters() if p.requires_grad]:
        parameter.data += 0.01 * torch.randn(
            parameter.shape, generator=generator
        )  # it may begin as the teacher
    return {"teacher": teacher, "student": pupil, **more}


def with_place_for_guidance() -> Any:
    """A network of text-to-image models, of classes here, as the tiny ones of pixels have no place for w."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        cross_attention_dim=4, attention_head_dim=4, num_class_embeds=4,
    )  # fmt: skip


def called_with_guidance(network: Any, x_t: torch.Tensor, time: torch.Tensor, cond: Any) -> torch.Tensor:
    weight = cond.get(GUIDANCE)
    embedded = None if weight is None else guidance_input.embedded(weight, 8)
    states = torch.ones(len(x_t), 2, 4)
    output: torch.Tensor = network(
        x_t, time, states, class_labels=cond["class_labels"], timestep_cond=embedded
    ).sample
    return output


def losses_of(
    method: Method, nets: dict[str, Any], stage: Stage, seed: int, update: int = 0, count: int = 6
) -> Iterator[Loss]:
    """Those of one update on a few random images, which are NaN where the method needs none."""
    rng = torch.Generator().manual_seed(seed)
    x0 = torch.rand(count, 1, 8, 8, generator=rng) * 2 - 1
    noise = None if stage.pairs is None else torch.randn(x0.shape, generator=rng)
    if noise is None and not method.learns_from_data():
        x0 = torch.full_like(x0, torch.nan)
    cond = {"class_labels": torch.arange(count) % 3}
    if stage.guidance_range is not None:
        cond[GUIDANCE] = torch.linspace(*stage.guidance_range, count)
    batch = Batch(x0, cond, noise)
    return method.losses(nets, batch, Step(stage, update), rng)


def check_losses(method: Method) -> None:
    """Finite losses, gradients only where named, every network that learns named, the teacher unchanged, the
    same seed the same losses."""
    nets = nets_of(method)
    teacher_before = [p.clone() for p in nets["teacher"].parameters()]
    stages = method.stages(nets["teacher"])
    assert stages and len({stage.name for stage in stages}) == len(stages)
    learns = {name for name, net in nets.items() if any(p.requires_grad for p in net.parameters())}
    for stage, update in ((stages[0], 0), (stages[-1], stages[-1].updates - 1)):
        values, named = [], set()
        for loss in losses_of(method, nets, stage, 11, update):
            assert loss.value.shape == () and loss.value.isfinite()
            for value in loss.metrics.values():
                assert value.shape == (6,) and value.isfinite().all() and not value.requires_grad
            own = [p for p in nets[loss.network].parameters() if p.requires_grad]
            loss.value.backward(inputs=own)
            grads = [p.grad for p in own if p.grad is not None]
            assert any(g.abs().sum() > 0 for g in grads) and all(g.isfinite().all() for g in grads)
            others = [p for name, net in nets.items() if name != loss.network for p in net.parameters()]
            assert all(p.grad is None for p in others)
            for parameter in own:
                parameter.grad = None
            values.append(loss.value.item())
            named.add(loss.network)
        idle = sorted(learns - named)
        assert not idle, f"no loss trains {idle}: requires_grad_(False) is for networks that do not learn"
        again, others = (
            [loss.value.item() for loss in losses_of(method, nets, stage, seed, update)] for seed in (11, 12)
        )
        assert values == again, "the same seed gives other losses: every random number comes from rng"
        assert values != others, "another seed gives the same losses"
        method.after_update(nets, Step(stage, update))
    assert all(torch.equal(a, b) for a, b in zip(teacher_before, nets["teacher"].parameters(), strict=True))


class Killed(Exception):
    """The end of a process, in one that goes on."""


class Dying:
    """A method whose process ends in this update, once the network of its first loss has been updated.

    die: how; it does not return.
    """

    def __init__(self, method: Method, update: int, die: Callable[[], object]) -> None:
        self.method, self.update, self.die = method, update, die
        self.after_update = method.after_update

    def losses(self, nets: Any, batch: Batch, step: Step, rng: torch.Generator) -> Iterator[Loss]:
        losses = self.method.losses(nets, batch, step, rng)
        yield next(losses)
        if step.update == self.update:
            self.die()
        yield from losses


def killed() -> NoReturn:
    raise Killed


def train(
    method: Method,
    folder: Path,
    *,
    updates: int = 6,
    stop_at: int | None = None,
    killed_in: int | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains the first stage, shortened; returns the networks, and the log without its timings."""
    nets, run, done = nets_of(method), RunFolder(folder, {}), [0]
    stage = replace(method.stages(nets["teacher"])[0], updates=updates)
    training = Training(batch_size=8, micro_batches=2, log_every=1)
    dying: Any = method if killed_in is None else Dying(method, killed_in, killed)
    with suppress(Interrupted, Killed):
        run_stage(
            Accelerator(), dying, stage, nets, examples(method, stage), training, run, seed=0, stage_index=0,
            on_update=lambda update, record: done.append(update),
            should_stop=lambda: done[-1] + 1 == stop_at,
        )  # fmt: skip
    run.close()
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return nets, [{key: r[key] for key in r if key not in MEASURED} for r in records]


def check_resumes(method: Method, folder: Path) -> None:
    """A run that was stopped, and then killed amid the losses of an update, ends with the bits of an unbroken
    one: weights, averages, log."""
    whole, records = train(method, folder / "whole")
    train(method, folder / "parts", stop_at=3)
    _, more = train(method, folder / "parts", killed_in=4)
    assert len(more) == 4  # it had gone on from the third
    parts, again = train(method, folder / "parts")
    assert len(records) == 6 and records == again
    for name, net in whole.items():
        for key, value in net.state_dict().items():
            assert torch.equal(value, parts[name].state_dict()[key]), (name, key)
