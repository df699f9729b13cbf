"""The denoiser: any network read as a prediction of x0."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffkd.core import guidance as guides
from diffkd.core import paths
from diffkd.core.adapters import Adapter, own
from diffkd.core.conditioning import Codec, Cond, Conditioner
from diffkd.core.guidance import Guide
from diffkd.core.interval import attached
from diffkd.core.losses import Weighting, weighting_for
from diffkd.core.schedules import PREDICTIONS, Schedule, Time, read_prediction
from diffkd.errors import UserError
from diffkd.io.naming import called

INTERVAL = "interval"  # the conditioning that a network with an interval embedding takes
GUIDANCE = "guidance_scale"  # the conditioning that says w of each example, as an input or for guidance
USUAL_GUIDANCE = 7.5  # of stock text-to-image pipelines
MOST_NOISE = 30.0  # sigma / alpha at t = 1 up to which an epsilon network's x0 is of use
StockSampler = Literal["ddim", "renoise"]  # those that a stock pipeline draws with, to the bit


class Predicted(NamedTuple):
    """What one network call predicts, each (B, C, H, W): x_t = alpha x0 + sigma eps."""

    x0: Tensor
    eps: Tensor


Call = Callable[[nn.Module, Tensor, Tensor, Cond], Any]


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Any:
    """How most networks are called; a family whose networks take something else has a function like this."""
    return network(x_t, time, **cond)


class Denoiser(nn.Module):
    """A network read as a prediction of x0: (B, C, H, W), (B,) -> (B, C, H, W).

    network: called as call(network, x_t, time, cond), by default network(x_t, time, **cond); may return a
    tensor, a tuple, or an object with `.sample`.
    prediction: what it outputs, one of epsilon, v_prediction, sample, flow.
    shape: (C, H, W) of one image; read from the network's config where it has one.
    num_classes, null_label: how many class labels it takes, and the label that means "no class".
    example: what else it takes as `cond`, of one example, zeros: such as a prompt's embedding.
    codec: what turns images into the space that it works in and back; None where that is pixels.
    conditioner: what turns prompts into `cond`; None for a model without.
    clip: bound on x0 while sampling images (never inside a distillation target), None for none.
    steps: its own number of sampling steps, None for a model that was not distilled.
    sampler: ddim or renoise, the one that it samples with by default and is saved for.
    guidance_baked_in: the guidance weight that it was distilled with, 1 for none.
    guidance_range: least and largest weight of a network that takes it as an input, None for one that does
    not. guidance_by_default: the weight that its stock pipeline names, where that is in the range.
    schedule_of: the schedule by the shape of what it works on, where the stock pipeline's goes by that.
    guide: the form of its guidance, a function of the outputs without condition and with it, and of w.
    guidance_kind, worse: see `guidance_kinds.set_kind`.
    name: what messages call it.

    States keep their dtype; the network runs in its own. Coefficients are float64, rounded once. Raises
    UserError for a prediction type that does not determine x0 on this schedule, such as eps at alpha = 0.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction: str,
        *,
        shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        null_label: int | None = None,
        clip: float | None = None,
        steps: int | None = None,
        sampler: StockSampler = "ddim",
        guidance_baked_in: float = 1.0,
        guidance_range: tuple[float, float] | None = None,
        guidance_by_default: float = USUAL_GUIDANCE,
        schedule_of: Callable[[tuple[int, int, int]], Schedule] | None = None,
        call: Call = call,
        guide: Guide = guides.plain,
        example: Cond | None = None,
        codec: Codec | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise UserError(f"prediction type {prediction!r} is unknown; use one of {', '.join(PREDICTIONS)}")
        schedule.check_prediction(prediction)
        made = getattr(call, "prediction", prediction)
        if prediction != made:
            raise UserError(
                f"this network is preconditioned: what is made of its output is {made}, not {prediction}; "
                f"leave prediction out, or use {made}"
            )
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.shape = shape or _shape_of(network)
        self.num_classes = num_classes
        self.null_label = null_label
        self.clip = clip
        self.steps = steps
        self.sampler: StockSampler = sampler
        self.guidance_baked_in, self.guidance_range = guidance_baked_in, guidance_range
        self.guidance_by_default, self.schedule_of = guidance_by_default, schedule_of
        self.call, self.codec, self.conditioner = call, codec, conditioner
        self.guide, self.guidance_kind = guide, guides.Kind()
        self.worse: Denoiser | None = None  # what guidance leads away from, in place of no condition
        self.times_of_worse: dict[float, float] = {}
        self.adapter: Adapter | None = None  # how its copies learn, where they share its weights
        self.folded: float | None = None  # the guidance weight baked in once it was read
        self.fused = False  # whether an adapter was merged into its network when it was read
        self.taught_kind: dict[str, Any] = {}  # the kind of the guidance that is baked in, as its card has it
        self.example = dict(example or {})
        self.name = "the model"
        self.label_dropout: float | None = None  # share of labels or prompts that its training left out
        self._null: tuple[str, ...] = ()
        self._negative = False  # whether that is the encoding of a prompt, which it knows in any case
        self.opened_with: dict[str, str] = {}  # options of `loading.load`, without which it is another model

    @property
    def preconditioned(self) -> bool:
        """Whether its call makes x0 of the network's output, as EDM does: at no noise that is its input."""
        return hasattr(self.call, "prediction")

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype; float64 for a network without weights, such as a closed form."""
        for parameter in self.network.parameters():  # torch.compile takes no default of next() before 2.7
            return parameter.dtype
        return torch.float64

    def requires_grad_(self, requires_grad: bool = True) -> Denoiser:
        """Of a network with an adapter that alone is switched on: what it shares with others never learns."""
        adapted = own(self.network) if requires_grad else {}
        for parameter in adapted.values():
            parameter.requires_grad_()
        return self if adapted else super().requires_grad_(requires_grad)

    def forward(self, x_t: Tensor, t: Time, *, guidance: float = 1.0, **cond: Tensor) -> Tensor:
        """Prediction of x0, (B, C, H, W). t: (B,) in (0, 1], or one for the whole batch."""
        return self.predict(x_t, t, guidance=guidance, **cond).x0

    def predict(self, x_t: Tensor, t: Time, *, guidance: float = 1.0, **cond: Tensor) -> Predicted:
        """x0 and eps. guidance: w in `uncond + w (cond - uncond)` (Ho & Salimans 2022), or of another
        `guide`. Or cond has `guidance_scale` (B,), the w of each example, which is an input where the network
        has one."""
        output = self.output(x_t, t, guidance=guidance, **cond)
        alpha, sigma = self.schedule.at(t, like=x_t)
        return Predicted(*read_prediction(self.prediction, x_t, output.to(x_t.dtype), alpha, sigma))

    def output(self, x_t: Tensor, t: Time, *, guidance: float = 1.0, **cond: Tensor) -> Tensor:
        """The network's output, of its prediction type: (B, C, H, W) in the network's dtype, or with guidance
        in that of x_t. x0 and eps are linear in it, so guiding the output guides both; a form that is not
        linear is meant for outputs, as stock pipelines have it.

        cond: may hold `interval` (B,), t - r of the step from t to r, for a network that takes one.
        """
        weight: float | Tensor = guidance
        if GUIDANCE in cond and self.guidance_range is None:
            weight = cond.pop(GUIDANCE).to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1))
        if isinstance(weight, Tensor) or weight != 1.0:
            return self._guided(x_t, t, weight, cond)
        x_t = x_t.to(self.dtype)
        second = attached(self.network)
        with nullcontext() if second is None else second.told(cond.pop(INTERVAL, None)):
            output: Any = self.call(self.network, x_t, self.schedule.network_time(t, x_t), cond)
        sample: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        return sample

    def _guided(self, x_t: Tensor, t: Time, weight: guides.Weight, cond: dict[str, Any]) -> Tensor:
        """The output with guidance, in the dtype of x_t: of one call where its kind has none at t, if t is a
        number; else of two, as one of twice the batch or, of a worse model, one of each."""
        kind, worse = self.guidance_kind, self.worse
        inside = kind.inside(self.schedule, t)
        if inside is False:
            return self.output(x_t, t, **cond).to(x_t.dtype)
        if worse is None:
            x_t2, t2, cond2 = self._with_null(x_t, t, cond)
            given, null = self.output(x_t2, t2, **cond2).to(x_t.dtype).chunk(2)
        else:
            given = self.output(x_t, t, **cond).to(x_t.dtype)
            if worse.num_classes is None:
                cond = {key: value for key, value in cond.items() if key != "class_labels"}
            null = paths.output_of_another(
                lambda x, s: worse.output(x, s, **cond), worse.schedule, self.schedule,
                (worse.prediction, self.prediction), x_t, t, self._time_of(worse, t),
            )  # fmt: skip
        return kind.combined(self.guide, null, given, weight, inside)

    def _time_of(self, worse: Denoiser, t: Time) -> Time:
        """The worse model's own time of this noise level. A number is one again, cached as `Schedule.numbers`
        are: a captured or compiled run finds it."""
        if worse.schedule is self.schedule:
            return t
        if isinstance(t, Tensor):
            return paths.time_on(self.schedule, worse.schedule, t)
        if t not in self.times_of_worse:
            time = torch.tensor([t], dtype=torch.float64)
            self.times_of_worse[t] = paths.time_on(self.schedule, worse.schedule, time).item()
        return self.times_of_worse[t]

    def calls(self, t: float, weight: float = 1.0) -> int:
        """How many network evaluations an output at t is, with this weight: 1 or 2."""
        return 2 if weight != 1.0 and self.guidance_kind.inside(self.schedule, t) else 1

    def _with_null(self, x_t: Tensor, t: Time, cond: Cond) -> tuple[Tensor, Time, dict[str, Any]]:
        """The batch doubled: the first half conditional, the second not."""
        if self.guidance_range is not None:
            raise UserError(
                f"{self.name} takes its guidance as an input and is not guided by a second pass; give the "
                f"weight of each example as {GUIDANCE}, and leave out {called('guidance')}"
            )
        self.check_guidance()
        if self.conditioner is not None and not self._null:
            self.set_null(self.conditioner.null())
        null = self.null_of(cond)
        t2 = t if isinstance(t, float) else torch.cat([t, t])
        return (
            torch.cat([x_t, x_t]), t2, {key: torch.cat([value, null[key]]) for key, value in cond.items()}
        )  # fmt: skip

    def null_of(self, cond: Cond) -> dict[str, Tensor]:
        """The same conditioning without its label or prompt: what guidance leads away from, and what stands
        in its place where it is dropped in training. Unchanged where nothing means "no condition"."""
        null = dict(cond)
        if "class_labels" in cond and self.null_label is not None:
            null["class_labels"] = torch.full_like(cond["class_labels"], self.null_label)
        for key, value in self.null.items():
            null[key] = value.to(cond[key].dtype).expand_as(cond[key])
        return null

    @property
    def weighting(self) -> Weighting:
        """The weight that turns an error in x0 into an error in what its network outputs."""
        return "edm" if self.preconditioned else weighting_for(self.prediction)

    @property
    def usual_guidance(self) -> float:
        """The weight that it is drawn with where none is named."""
        if self.guidance_range is None:
            return 1.0
        least, largest = self.guidance_range
        return min(max(self.guidance_by_default, least), largest)

    def guided_by(self, weight: float, count: int) -> dict[str, Any]:
        """What a call for `count` images is given for this weight: an input, where the network takes one."""
        if self.guidance_range is None:
            return {"guidance": weight}
        return {GUIDANCE: torch.full((count,), weight, device=self.device)}

    @property
    def null(self) -> dict[str, Tensor]:
        """The encoding of no prompt, each (1, ...): {} until `set_null` gave it, and for models without
        prompts."""
        return {key: getattr(self, f"null_{key}") for key in self._null}

    @property
    def around(self) -> dict[str, Codec | Conditioner]:
        """Codec and conditioner, by these names; {} for models without."""
        there = {"codec": self.codec, "conditioner": self.conditioner}
        return {key: value for key, value in there.items() if value is not None}

    def fit(self, shape: tuple[int, int, int]) -> None:
        """Makes it one of this shape (C, H, W), in place."""
        self.shape = shape
        if self.schedule_of is not None:
            self.schedule = self.schedule_of(shape)

    def close(self) -> None:
        """Frees the weights of codec and conditioner, which are read again when they are used."""
        for part in self.around.values():
            part.close()

    def set_null(self, null: Cond, *, negative: bool = False) -> None:
        """null: what the conditioner makes of no prompt, or where negative is set of a negative one, each
        (1, ...)."""
        self._null, self._negative = tuple(null), negative
        for key, value in null.items():
            self.register_buffer(f"null_{key}", value.detach().to(self.device), persistent=False)

    def example_inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x_t, t and cond to call it with for one image: zeros, the time of pure noise, the first class or
        an empty prompt."""
        if self.shape is None:
            raise UserError(
                "the network's config has no sample_size, so the size of its images is unknown; add it"
            )
        x = torch.zeros(1, *self.shape, device=self.device)
        labels = torch.zeros(1, dtype=torch.long, device=self.device)
        cond = {} if self.num_classes is None else {"class_labels": labels}
        cond |= {key: value.to(self.device) for key, value in self.example.items()}
        if self.guidance_range is not None:
            cond[GUIDANCE] = torch.full((1,), self.usual_guidance, device=self.device)
        return x, torch.ones(1, dtype=torch.float64, device=self.device), cond

    def check_guidance(self) -> None:
        """Raises UserError where the model has nothing that means "no condition", or is known not to have
        learnt it, and has no worse model. label_dropout None, as of models made elsewhere, is not known."""
        if self.worse is not None:
            return
        if self.label_dropout == 0 and not self._negative:
            raise UserError(
                f"{self.name} was trained without leaving out {'labels' if self.num_classes else 'prompts'} "
                "(label_dropout 0 in its diffkd.json), so guidance has nothing to lead away from; use "
                f"{called('guidance')} 1, or train the teacher with denoising.label_dropout 0.1"
            )
        if self.conditioner is None and not self._null and self.null_label is None:
            raise UserError(
                "guidance needs a label that means no class, and this model has none; "
                f"use {called('guidance')} 1, or name it as {called('null_label')} where the model was "
                "trained with one"
            )

    def check_from_noise(self) -> None:
        """Raises UserError for an epsilon network whose x0 of pure noise is its own error enlarged."""
        alpha, sigma = self.schedule.numbers(1.0)
        if self.prediction == "epsilon" and sigma > MOST_NOISE * alpha:
            raise UserError(
                f"an epsilon network's x0 at t = 1 is its output times {sigma / alpha:.0f}, its error too; "
                f"put {{name: output, prediction: {self.schedule.bounded}}} before this method, which makes "
                "it predict that"
            )


def _shape_of(network: nn.Module) -> tuple[int, int, int] | None:
    config = getattr(network, "config", None)
    size = getattr(config, "sample_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return (config.in_channels, height, width)  # type: ignore[union-attr]
