"""Generating images with a denoiser, in batches. Image i depends on (seed, i) alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from diffkd.core import samplers
from diffkd.core.denoiser import GUIDANCE, Denoiser
from diffkd.errors import UserError
from diffkd.generation import asked, cuda_graphs
from diffkd.generation.labels import labels_for
from diffkd.generation.pixels import check_finite, host_arrays, to_pixels
from diffkd.generation.prompts import PromptEmbeddings, check_prompts
from diffkd.generation.timing import Timer
from diffkd.io.naming import called
from diffkd.io.prefetch import prefetch, to_device


class ImageGenerator:
    """n images of a denoiser, in batches: batch k holds the images from k * batch_size on.

    steps, sampler: default the denoiser's own. labels, or prompts (one, or several): repeated in turn; labels
    default to every class in turn. negative: a prompt that guidance leads away from, in place of the empty
    one. size: height and width, for models of latents; default the model's own. mode: auto, eager, graph or
    compile (`cuda_graphs.prepare`). options: guidance, eta.

    Image i starts from the noise of `torch.Generator().manual_seed(seed + i)` and goes on drawing from it
    where a sampler is stochastic, so the stock pipeline given these generators draws the same images.

    States are float32. On CUDA the network's weights are converted to channels_last in place. Raises
    UserError for arguments that do not fit the model, and for a batch too large for the memory, naming one
    that fits.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        n: int,
        *,
        steps: int | None = None,
        seed: int = 0,
        labels: int | Sequence[int] | Tensor | None = None,
        prompts: str | Sequence[str] | None = None,
        negative: str | None = None,
        size: tuple[int, int] | None = None,
        batch_size: int = 64,
        sampler: str | None = None,
        mode: str = "auto",
        **options: Any,
    ) -> None:
        steps, sampler = denoiser.steps if steps is None else steps, sampler or denoiser.sampler
        if steps is None:
            raise UserError("this model has no step count of its own; give the number of steps")
        for name, value in (("n", n), ("steps", steps), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{called(name)} is {value}; use 1 or more")
        if isinstance(prompts, str):  # and not its letters
            prompts = [prompts]
        labels = [labels] if isinstance(labels, int) else labels
        if sampler != "ancestral" and "eta" in options:
            raise UserError(
                f"eta is an option of the ancestral sampler, and the sampler is {sampler}; leave it out"
            )
        if not 0 <= seed < 2**63 - n:
            raise UserError(f"seed {seed} is out of range; use 0 to {2**63 - n - 1}")
        if steps > denoiser.schedule.num_train_timesteps:
            raise UserError(
                f"{steps} steps are more than the {denoiser.schedule.num_train_timesteps} time steps of "
                f"{denoiser.name}; use fewer"
            )
        cuda_graphs.check_mode(mode, denoiser.device)
        samplers.find(sampler)
        asked.say_what_it_was_made_for(denoiser, steps, sampler, options.get("guidance", 1.0))
        self.shape, self.size = asked.shapes(denoiser, size)
        self.denoiser = denoiser = asked.of_shape(denoiser, self.shape)
        self.n, self.steps, self.seed, self.sampler = n, steps, seed, sampler
        self.options, self.mode = options, mode
        self.labels = labels_for(denoiser, n, labels)
        check_prompts(denoiser, prompts, negative, options.get("guidance", 1.0))
        if options.get("guidance", 1.0) != 1.0 and denoiser.guidance_range is None and not negative:
            denoiser.check_guidance()
        self.embeddings: PromptEmbeddings | None = None
        if denoiser.codec is not None:
            denoiser.codec.to(denoiser.device)
        if denoiser.conditioner is not None:
            assert prompts is not None
            denoiser.conditioner.to(denoiser.device)
            self.embeddings = PromptEmbeddings(denoiser.conditioner, prompts, n, self.size)
        self.negative = negative
        self.keys = ["class_labels"] * (self.labels is not None) + [*denoiser.example]
        self.weight: float | None = None  # of a network that takes it as an input
        if denoiser.guidance_range is not None:
            self.keys.append(GUIDANCE)
            self.weight = self.options.pop("guidance", denoiser.usual_guidance)
            asked.say_range(denoiser, self.weight)
        self.batch_size = max(1, min(batch_size, n))
        self.device = denoiser.device
        eta = {"eta": options["eta"]} if "eta" in options else {}
        self.noises_per_image = 1 + samplers.fresh_noises(sampler, steps, **eta)
        self.timer = Timer(self.device)
        self.runner: cuda_graphs.Runner | None = None
        if self.device.type == "cuda":
            for one in (denoiser, denoiser.worse):
                if one is not None:
                    one.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def nfe(self) -> int:
        """Network evaluations of one image; a guided one is two, of the model and of a worse one if it has
        one."""
        weight = self.options.get("guidance", 1.0)
        return sum(self.denoiser.calls(t, weight) for t in samplers.times_asked(self.sampler, self.steps))

    @property
    def num_batches(self) -> int:
        return -(-self.n // self.batch_size)

    def sample(self, noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """x0 (B, C, H, W). noise: (noises_per_image, B, C, H, W), the first state, then fresh noise in the
        order of its use. cond: each (B, ...)."""
        first, *fresh = noise.unbind()
        if self.device.type == "cuda":
            first = first.contiguous(memory_format=torch.channels_last)
        rest, given = iter(fresh), cast("dict[str, Any]", dict(cond))
        return samplers.sample(
            self.denoiser, first, self.steps, self.sampler, fresh=lambda x: next(rest),
            **given, **self.options,
        )  # fmt: skip

    def pixels(self, noise: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor]:
        """From noise to pixels: uint8 (B, H, W, C), and whether all of them are finite. cond: the values of
        what a batch is conditioned on, in its order."""
        return self.decoded(self.sample(noise, dict(zip(self.keys, cond, strict=True))))

    def decoded(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """x0 to pixels, as `pixels`."""
        codec = self.denoiser.codec
        return to_pixels(x0 if codec is None else codec.decode(x0))

    @torch.inference_mode()
    def prepare(self) -> cuda_graphs.Runner:
        """Warms up, captures or compiles, once; on a CPU there is nothing to do unless mode is `compile`."""
        if self.runner is None:
            guided = self.options.get("guidance", 1.0) != 1.0 and self.denoiser.worse is None
            if self.embeddings is not None and guided:
                null = self.embeddings.conditioner.null(self.negative)
                self.denoiser.set_null(null, negative=bool(self.negative))
            fits = cuda_graphs.largest_fitting(self._prepare, self.batch_size)
            if fits < self.batch_size:
                self.runner = None  # prepared for another size
                raise UserError(
                    f"a batch of {self.batch_size} images does not fit into the memory of {self.device}; "
                    + (f"{fits} do: use a batch size of {fits}" if fits else "nor does one image")
                )
        assert self.runner is not None
        return self.runner

    def _prepare(self, batch: int) -> None:
        noise = torch.zeros(self.noises_per_image, batch, *self.shape, device=self.device)
        first = self._cond(0)
        cond = [first[key][:1].expand(batch, *first[key].shape[1:]).contiguous() for key in self.keys]
        self.runner = cuda_graphs.prepare(
            self.pixels, (noise, *cond), self.mode, self.device, self.num_batches
        )

    def batches(self, chosen: Iterable[int] | None = None) -> Iterator[Tensor]:
        """uint8 (B, H, W, C) on the device: every batch, or the chosen ones, unchanged. Raises UserError for
        values that are not finite: on a GPU after the first and the last batch."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for number, (pixels, batch_finite) in enumerate(self._run(chosen)):
            finite &= batch_finite
            if self.device.type == "cpu" or number == 0:  # a check of every batch would wait for each
                check_finite(finite)
            yield pixels
        check_finite(finite)

    def arrays(self, chosen: Iterable[int] | None = None) -> Iterator[np.ndarray]:
        """The same on the host, each array valid until the next is asked for, each checked to be finite."""
        return host_arrays(self._run(chosen), self.device)

    @torch.inference_mode()
    def _run(self, chosen: Iterable[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The results of `pixels` for these batches, with the noise of the next ones made meanwhile."""
        runner = self.prepare()
        numbers = list(range(self.num_batches) if chosen is None else chosen)
        noises: Iterator[Tensor] = map(self._noise, numbers)
        if self.device.type != "cpu":
            noises = prefetch(noises)
        for batch in numbers:
            with self.timer.host("noise"):
                noise = next(noises)
                cond = self._cond(batch)
            yield self._run_batch(runner, noise, cond)

    def _run_batch(
        self, runner: cuda_graphs.Runner, noise: Tensor, cond: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if not runner.fixed_shape:
            with self.timer.device("network"):
                x0 = self.sample(noise, cond)
            with self.timer.device("conversion"):
                return self.decoded(x0)
        count, missing = noise.shape[1], self.batch_size - noise.shape[1]
        if missing:  # the last batch: padded with its first image
            noise = torch.cat([noise, noise[:, :1].expand(-1, missing, -1, -1, -1)], 1)
            cond = {
                key: torch.cat([value, value[:1].expand(missing, *value.shape[1:])])
                for key, value in cond.items()
            }
        with self.timer.device("network and conversion"):
            pixels, finite = runner.call(noise, *(cond[key] for key in self.keys))
        return pixels[:count], finite

    def image_range(self, batch: int) -> tuple[int, int]:
        """The index of a batch's first image, and the index after its last."""
        return batch * self.batch_size, min((batch + 1) * self.batch_size, self.n)

    def _noise(self, batch: int) -> Tensor:
        images = range(*self.image_range(batch))
        generators = [torch.Generator("cpu").manual_seed(self.seed + i) for i in images]
        like = torch.empty(0)
        noise = torch.stack(
            [
                samplers.randn((len(generators), *self.shape), generators, like)
                for _ in range(self.noises_per_image)
            ]
        )
        return to_device(noise, self.device)

    def _cond(self, batch: int) -> dict[str, Tensor]:
        """What a batch is conditioned on, on the device."""
        start, stop = self.image_range(batch)
        cond = {} if self.labels is None else {"class_labels": self.labels[start:stop]}
        if self.embeddings is not None:
            cond |= self.embeddings.batch(start, stop)
        if self.weight is not None:
            cond[GUIDANCE] = torch.full((stop - start,), self.weight)
        return {key: to_device(value, self.device) for key, value in cond.items()}


def generate(
    denoiser: Denoiser,
    n: int,
    *,
    steps: int | None = None,
    seed: int = 0,
    labels: int | Sequence[int] | Tensor | None = None,
    prompts: str | Sequence[str] | None = None,
    negative: str | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 64,
    sampler: str | None = None,
    mode: str = "auto",
    share: tuple[int, int] = (0, 1),
    **options: Any,
) -> Iterator[Tensor]:
    """n images as uint8 batches (B, H, W, C) on the denoiser's device; arguments as for `ImageGenerator`.

    share: (rank, world), to generate only the batches rank, rank + world, ..., unchanged.

    >>> import diffkd
    >>> from diffkd.models.unet import UNet2D
    >>> network = UNet2D(channels=[8, 16], norm_groups=4, mid_attention=False).build((1, 8, 8), 3)
    >>> schedule = diffkd.schedules.Schedule.cosine(1024)
    >>> denoiser = diffkd.Denoiser(network, schedule, "v_prediction", num_classes=3)
    >>> [tuple(batch.shape) for batch in diffkd.generate(denoiser, 5, steps=2, labels=[0, 2], batch_size=4)]
    [(4, 8, 8, 1), (1, 8, 8, 1)]
    """
    generator = ImageGenerator(
        denoiser, n, steps=steps, seed=seed, labels=labels, prompts=prompts, negative=negative, size=size,
        batch_size=batch_size, sampler=sampler, mode=mode, **options,
    )  # fmt: skip
    yield from generator.batches(range(share[0], generator.num_batches, share[1]))
