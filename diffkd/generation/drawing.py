"""Many images from a denoiser. Image i depends on (seed, i) alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.generation import cuda_graphs
from diffkd.generation.timing import Clock
from diffkd.io.prefetch import prefetch, to_device

GOLDEN = (5**0.5 - 1) / 2


def to_uint8(x0: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, by the very operations of the stock pipelines."""
    shades = (x0 / 2).add_(0.5).clamp_(0, 1).mul_(255).round_()
    return shades.to(torch.uint8).permute(0, 2, 3, 1)


def labels_for(denoiser: Denoiser, n: int, labels: Sequence[int] | Tensor | None) -> Tensor | None:
    """Labels of images 0 to n - 1: those given, repeated in turn, or every class in turn; None if it takes
    none.

    Raises UserError for labels that the model does not take.
    """
    if denoiser.num_classes is None:
        if labels is not None:
            raise UserError("class labels were given, and this model is unconditional; leave them out")
        return None
    given = list(range(denoiser.num_classes) if labels is None else map(int, labels))
    wrong = [label for label in given if not 0 <= label < denoiser.num_classes]
    if wrong or not given:
        value = wrong[0] if wrong else "(none)"
        raise UserError(
            f"class label {value} is out of range; this model has labels 0 to {denoiser.num_classes - 1}"
        )
    return torch.tensor(given)[torch.arange(n) % len(given)]


class Drawing:
    """n images of a denoiser: what is drawn, and how it is run.

    steps, sampler: default the denoiser's own. labels: repeated in turn; default every class in turn. Image i starts
    from the noise of `torch.Generator().manual_seed(seed + i)` and goes on drawing from it where a sampler is
    stochastic, so the stock pipeline given these generators draws the same pictures. mode: auto, eager, graph
    or compile (`capture.prepare`). options: guidance, eta.

    States are float32. On CUDA the network's weights are put into channels_last, where they lie. Raises
    UserError for what cannot be drawn, and for a batch that does not fit, naming one that does.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        n: int,
        *,
        steps: int | None = None,
        seed: int = 0,
        labels: Sequence[int] | Tensor | None = None,
        batch_size: int = 64,
        sampler: str | None = None,
        mode: str = "auto",
        **options: Any,
    ) -> None:
        steps, sampler = steps or denoiser.steps, sampler or denoiser.sampler
        if steps is None:
            raise UserError("this model has no step count of its own; say how many steps to take")
        if sampler != "ancestral" and "eta" in options:
            raise UserError(f"eta is the noise of the ancestral sampler, and the sampler is {sampler}")
        if not 0 <= seed < 2**63 - n:
            raise UserError(f"seed {seed} is out of range; use 0 to {2**63 - n - 1}")
        if denoiser.shape is None:
            raise UserError(
                "the shape of this model's images is unknown; build its Denoiser with shape=(C, H, W)"
            )
        cuda_graphs.check(mode, denoiser.device)
        samplers.find(sampler)
        self.denoiser, self.n, self.steps, self.seed, self.sampler = denoiser, n, steps, seed, sampler
        self.options, self.mode = options, mode
        self.labels = labels_for(denoiser, n, labels)
        self.batch_size = max(1, min(batch_size, n))
        self.device = denoiser.device
        eta = {"eta": options["eta"]} if "eta" in options else {}
        self.draws = 1 + samplers.fresh_noises(sampler, steps, **eta)
        self.clock = Clock(self.device)
        self.runner: cuda_graphs.Runner | None = None
        if self.device.type == "cuda":
            denoiser.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def nfe(self) -> int:
        """Network evaluations of one image; a guided one is two."""
        return samplers.nfe(self.sampler, self.steps) * (1 if self.options.get("guidance", 1.0) == 1 else 2)

    @property
    def blocks(self) -> int:
        """How many batches there are: block k holds the images from k * batch_size on."""
        return -(-self.n // self.batch_size)

    def denoise(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """noise: (draws, B, C, H, W), what every image starts from and then what is drawn on the way."""
        first, *fresh = noise.unbind()
        if self.device.type == "cuda":
            first = first.contiguous(memory_format=torch.channels_last)
        cond: dict[str, Any] = {} if labels is None else {"class_labels": labels}
        rest = iter(fresh)
        return samplers.sample(
            self.denoiser, first, self.steps, self.sampler, fresh=lambda x: next(rest), **cond, **self.options
        )  # fmt: skip

    def pixels(self, noise: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """From noise to pixels: uint8 (B, H, W, C), and whether all values were finite."""
        return _finish(self.denoise(noise, labels))

    @torch.inference_mode()
    def prepare(self) -> cuda_graphs.Runner:
        """Warmed up, captured or compiled, once; on a CPU there is nothing to do but for `compile`."""
        if self.runner is None:
            fits = cuda_graphs.fitting(self._prepare, self.batch_size)
            if fits < self.batch_size:
                self.runner = None  # it is of another size
                raise UserError(
                    f"a batch of {self.batch_size} images does not fit into the memory of {self.device}; "
                    + (f"{fits} do: use a batch size of {fits}" if fits else "nor does one image")
                )
        assert self.runner is not None
        return self.runner

    def _prepare(self, batch: int) -> None:
        noise = torch.zeros(self.draws, batch, *self._shape, device=self.device)
        labels = None if self.labels is None else torch.zeros(batch, dtype=torch.long, device=self.device)
        self.runner = cuda_graphs.prepare(self.pixels, (noise, labels), self.mode, self.device, self.blocks)

    @property
    def _shape(self) -> tuple[int, int, int]:
        assert self.denoiser.shape is not None
        return self.denoiser.shape

    def batches(self, blocks: Iterable[int] | None = None) -> Iterator[Tensor]:
        """uint8 (B, H, W, C) on the device, of every block or of those named, each as it would be drawn among
        all. Raises UserError where values are not finite: on a GPU after the first and the last."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for number, (pixels, fine) in enumerate(self._drawn(blocks)):
            finite &= fine
            if self.device.type == "cpu" or number == 0:  # of every one it would be a wait each time
                check_finite(finite)
            yield pixels
        check_finite(finite)

    def arrays(self, blocks: Iterable[int] | None = None) -> Iterator[np.ndarray]:
        """The same on the host, each good until the next is asked for, and each of finite values.

        From CUDA each is copied into one of two pinned buffers, on another stream, while the next is drawn.
        """
        if self.device.type != "cuda":
            for pixels, fine in self._drawn(blocks):
                check_finite(fine)
                yield pixels.cpu().numpy()
            return
        stream = torch.cuda.Stream(self.device)
        buffers: list[tuple[Tensor, Tensor]] = []
        copying: list[tuple[Tensor, Tensor, Any]] = []
        for number, (pixels, fine) in enumerate(self._drawn(blocks)):
            if number < 2:
                buffers.append((_pinned(pixels), _pinned(fine)))
            room, said = buffers[number % 2]
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for there, x in ((room[: len(pixels)], pixels), (said, fine)):
                    there.copy_(x, non_blocking=True)
                    x.record_stream(stream)
            copying.append((room[: len(pixels)], said, stream.record_event()))
            if number:
                yield _arrived(*copying.pop(0))
        for waiting in copying:
            yield _arrived(*waiting)

    @torch.inference_mode()
    def _drawn(self, blocks: Iterable[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels, and whether they come of finite values."""
        runner = self.prepare()
        wanted = list(range(self.blocks) if blocks is None else blocks)
        noises: Iterator[Tensor] = map(self._noise, wanted)
        if self.device.type != "cpu":
            noises = prefetch(noises)
        for block in wanted:
            with self.clock.host("noise"):
                noise = next(noises)
                labels = self._labels(block)
            yield self._run(runner, noise, labels)

    def _run(self, runner: cuda_graphs.Runner, noise: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        if not runner.fixed:
            with self.clock.device("network"):
                x0 = self.denoise(noise, labels)
            with self.clock.device("conversion"):
                return _finish(x0)
        count, missing = noise.shape[1], self.batch_size - noise.shape[1]
        if missing:  # the last block: filled up with its first image
            noise = torch.cat([noise, noise[:, :1].expand(-1, missing, -1, -1, -1)], 1)
            labels = None if labels is None else torch.cat([labels, labels[:1].expand(missing)])
        with self.clock.device("network and conversion"):
            pixels, fine = runner.call(noise, labels)
        return pixels[:count], fine

    def span(self, block: int) -> tuple[int, int]:
        """The first image of a block, and the first after it."""
        return block * self.batch_size, min((block + 1) * self.batch_size, self.n)

    def _noise(self, block: int) -> Tensor:
        generators = [torch.Generator("cpu").manual_seed(self.seed + i) for i in range(*self.span(block))]
        like = torch.empty(0)
        noise = torch.stack(
            [samplers.randn((len(generators), *self._shape), generators, like) for _ in range(self.draws)]
        )
        return to_device(noise, self.device)

    def _labels(self, block: int) -> Tensor | None:
        return None if self.labels is None else to_device(self.labels[slice(*self.span(block))], self.device)


def generate(
    denoiser: Denoiser,
    n: int,
    *,
    steps: int | None = None,
    seed: int = 0,
    labels: Sequence[int] | Tensor | None = None,
    batch_size: int = 64,
    sampler: str | None = None,
    mode: str = "auto",
    share: tuple[int, int] = (0, 1),
    **options: Any,
) -> Iterator[Tensor]:
    """n images as uint8 batches (B, H, W, C) on the denoiser's device, by a `Drawing` of these arguments.

    share: (rank, world) draws batches rank, rank + world, ... alone, each as if it were one of all.
    """
    drawing = Drawing(
        denoiser, n, steps=steps, seed=seed, labels=labels, batch_size=batch_size, sampler=sampler, mode=mode,
        **options,
    )  # fmt: skip
    yield from drawing.batches(range(share[0], drawing.blocks, share[1]))


def proportional(counts: Sequence[int], n: int) -> Tensor:
    """n labels of which each class has its share of `counts`; label i is the same whatever n.

    By the multiples of the golden ratio, which fill [0, 1) evenly.
    """
    share = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    place = (torch.arange(n, dtype=torch.float64) * GOLDEN + 0.5) % 1
    return torch.searchsorted(share, place * share[-1], right=True)


def _finish(x0: Tensor) -> tuple[Tensor, Tensor]:
    return to_uint8(x0).contiguous(), x0.isfinite().all()


def _pinned(like: Tensor) -> Tensor:
    return torch.empty_like(like, device="cpu").pin_memory()


def _arrived(pixels: Tensor, fine: Tensor, copied: Any) -> np.ndarray:
    copied.synchronize()
    check_finite(fine)
    return pixels.numpy()


def check_finite(finite: Tensor) -> None:
    """Raises UserError where a model's values were not."""
    if not finite:
        raise UserError(
            "the model draws images with NaN or infinite values; its weights or its steps are broken"
        )
