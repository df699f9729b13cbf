"""Feature distillation (Kim et al. 2023): a small student learns data, its teacher's outputs and features."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core.activations import capture_activations
from diffkd.core.conditioning import dropped
from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import Weighting, relative_error, squared_error, weight_at
from diffkd.core.noise import add_noise, grid_times
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Loss, Method, Needs, Stage, Step
from diffkd.models import features


class Projectors(nn.Module):
    """Linear maps from the student's widths to the teacher's, where they differ: 1x1 convolutions of feature
    maps, linear layers of tokens.

    widths: (student's, teacher's) by the teacher's names. tokens: which of these are tokens. Linear maps,
    because features should agree up to a change of basis. They are not part of the student that is saved.
    """

    def __init__(self, widths: Mapping[str, tuple[int, int]], tokens: Collection[str] = ()) -> None:
        super().__init__()
        self.names = list(widths)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same in every process
            self.maps = nn.ModuleList(
                nn.Linear(ours, theirs) if name in tokens else nn.Conv2d(ours, theirs, 1)
                for name, (ours, theirs) in widths.items()
            )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's features by the teacher's names, (B, C, H, W) or (B, N, C), in the teacher's
        widths."""
        return {**features, **{n: m(features[n]) for n, m in zip(self.names, self.maps, strict=True)}}


class Feature(Method):
    """Feature distillation: denoising, output matching and feature matching together."""

    reference: ClassVar[str] = "Kim et al. 2023, https://arxiv.org/abs/2305.15798"
    needs: ClassVar[Needs] = Needs(
        real=True,
        networks=("projectors where widths differ",),
        memory="little for projectors; features of both",
        in_short="features",
        calls="1 student, 1 teacher",
        passes={"student": 1, "teacher": 1},
    )
    hooks: ClassVar[bool] = True

    updates: int = Field(2000, ge=1, description="updates in all")
    learning_rate: float = Field(1e-3, gt=0, description="after the warm-up; falls linearly to zero")
    warmup: int = Field(50, ge=0, description="updates over which the learning rate rises")
    task: float = Field(1.0, ge=0, description="weight of the denoising loss on the data")
    output: float = Field(1.0, ge=0, description="weight of output matching")
    feature: float = Field(1.0, ge=0, description="weight of feature matching; 0 reads no features")
    blocks: dict[str, str] | list[str] | None = Field(
        None,
        description="modules whose outputs are matched, or a mapping from the teacher's to the student's; "
        "default every block of both",
    )
    guidance: float = Field(1.0, ge=0, description="guidance weight baked into the student; 1 is unguided")
    weight: Weighting | None = Field(
        None, description="of squared errors in x0; default the error in the student's own output"
    )
    gamma: float = Field(5.0, gt=0, description="bound of the min_snr weight")
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="share of labels replaced by the null label, for guidance"
    )

    @model_validator(mode="after")
    def _has_a_loss(self) -> Feature:
        if self.task == self.output == self.feature == 0:
            raise ValueError("task, output and feature are all 0; give one of them a weight")
        if self.feature > 0 and self.blocks is not None and not self.blocks:
            raise ValueError("method.blocks is empty; leave it out for every block, or set feature: 0")
        return self

    def learns_what_data_is(self) -> bool:
        """By its task, which denoises it."""
        return self.task > 0

    def stages(self, start: Denoiser) -> list[Stage]:
        if self.guidance != 1.0:
            start.check_guidance()
        return [
            Stage(
                "feature", self.updates, self.learning_rate, self.warmup, start.steps, guidance=self.guidance,
                drawn=start.sampler,
            )
        ]  # fmt: skip

    def networks(self, teacher: Denoiser, student: Denoiser) -> dict[str, nn.Module]:
        """Projectors, if widths differ. Raises UserError for features that cannot be matched."""
        pairs = self.pairs(teacher, student)
        if self.feature > 0 and not pairs:
            raise UserError(
                "these networks have no blocks that are known; name the modules to match in method.blocks"
            )
        features.check_names("teacher", teacher, pairs.keys())
        features.check_names("student", student, pairs.values())
        theirs = features.shapes(teacher, list(pairs))
        ours = features.shapes(student, list(pairs.values()))
        for name, own in pairs.items():
            if _places(ours[own]) is None or _places(theirs[name]) != _places(ours[own]):
                raise UserError(
                    f"method.blocks: {name} of the teacher outputs {_size(theirs[name])} and {own} of the "
                    f"student {_size(ours[own])}; match modules of the same resolution"
                )
        tokens = {name for name in pairs if len(theirs[name]) == 2}
        widths = {name: (_width(ours[own]), _width(theirs[name])) for name, own in pairs.items()}
        widths = {name: both for name, both in widths.items() if both[0] != both[1]}
        return {"projectors": Projectors(widths, tokens).to(student.device)} if widths else {}

    def pairs(self, teacher: Denoiser, student: Denoiser) -> dict[str, str]:
        """The modules to match: the teacher's name -> the student's."""
        if self.feature == 0:
            return {}
        if self.blocks is None:
            return features.corresponding(teacher, student)
        return self.blocks if isinstance(self.blocks, dict) else {name: name for name in self.blocks}

    def losses(
        self, nets: Mapping[str, Any], batch: Batch, step: Step, rng: torch.Generator
    ) -> Iterator[Loss]:
        student, teacher, x0 = nets["student"], nets["teacher"], batch.x0
        pairs = self.pairs(teacher, student)
        # 1. a time that the teacher is sampled at, the noised data, some labels dropped
        steps = step.stage.steps or student.schedule.num_train_timesteps
        t, _ = grid_times(len(x0), steps, rng, x0.device)
        x_t = add_noise(student.schedule, x0, t, rng)
        cond = dropped(batch.cond, teacher.null_of(batch.cond), self.label_dropout, rng)
        # 2. the teacher's features and guided output; the first half of a guided batch is conditional
        with torch.no_grad(), capture_activations(teacher.network, list(pairs)) as theirs:
            target = teacher(x_t, t, guidance=step.stage.guidance, **cond)
        # 3. the student's features and output
        with capture_activations(student.network, list(pairs.values())) as ours:
            denoised = student(x_t, t, **cond)
        theirs = _of_image(teacher, {name: value[: len(x_t)] for name, value in theirs.items()}, x_t, cond)
        ours = _of_image(student, ours, x_t, cond)
        # 4. L = task * denoising + output * output matching + feature * feature matching
        name = self.weight or student.weighting
        w = weight_at(name, student.schedule, t, gamma=self.gamma)
        gap = squared_error(denoised, target)
        loss = w * (self.task * squared_error(denoised, x0) + self.output * gap)
        metrics = {"t": t, "gap": gap.detach().sqrt()}
        if pairs:
            distance = _feature_distance(nets, pairs, theirs, ours)
            metrics["feature"] = distance.detach()
            loss = loss + self.feature * distance
        yield Loss("student", loss.mean(), {**metrics, "loss": loss.detach()})
        # 5. the projectors learn too, on the same features
        if "projectors" in nets:
            fixed = {key: value.detach() for key, value in ours.items()}
            yield Loss("projectors", _feature_distance(nets, pairs, theirs, fixed).mean())


def _of_image(
    denoiser: Denoiser, found: Mapping[str, Tensor], x_t: Tensor, cond: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {
        name: features.of_image(denoiser.network, name, value, x_t, cond) for name, value in found.items()
    }


def _feature_distance(
    nets: Mapping[str, Any],
    pairs: Mapping[str, str],
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
) -> Tensor:
    """Mean over blocks of |student's - teacher's|^2 / |teacher's|^2, (B,): scales count equally."""
    projected = {name: ours[own] for name, own in pairs.items()}
    if "projectors" in nets:
        projected = nets["projectors"](projected)
    errors = [relative_error(projected[name].float(), theirs[name].float()) for name in pairs]
    return torch.stack(errors).mean(0)


def _places(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Height and width of a feature map (C, H, W), the number of tokens (N, C); None for what is neither."""
    return {3: shape[1:], 2: shape[:1]}.get(len(shape))


def _width(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 3 else shape[1]


def _size(shape: tuple[int, ...]) -> str:
    places = _places(shape)
    if places is None:
        return "no feature map and no tokens"
    return "x".join(map(str, places)) if len(places) == 2 else f"{places[0]} tokens"
