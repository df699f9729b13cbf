"""Which prompt each image gets, and what the model is conditioned on for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffkd.core.conditioning import Conditioner
from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.places import is_text
from diffkd.io.text import quoted

HELD = 1 << 30  # bytes of embeddings that are made at once, after which the encoders are freed


def check_prompts(
    denoiser: Denoiser,
    prompts: Sequence[str] | None,
    negative: str | None = None,
    guidance: float | None = None,
) -> None:
    """Raises UserError for prompts of a model that takes none, and the reverse; for those that are no text;
    and for a negative prompt where nothing leads away from it. guidance: None where it is not known yet."""
    if denoiser.conditioner is None:
        for what, given in (("prompts", prompts), ("a negative prompt", negative)):
            if given is not None:
                raise UserError(
                    f"{what} {quoted(given, 60)} given, and {denoiser.name} takes none; leave it out"
                )
    elif not prompts:
        raise UserError(f"{denoiser.name} draws from prompts, and there are none; give {called('prompts')}")
    for what, given in (("prompt", prompts or ()), ("negative prompt", (negative or "",))):
        wrong = next((one for one in given if not is_text(one)), None)
        if wrong is not None:  # as a shell hands on what is typed or read in another encoding
            raise UserError(f"{what} {quoted(wrong, 60)} is not text in UTF-8; write it in UTF-8")
    if negative is not None and denoiser.guidance_range is not None:
        raise UserError(
            f"{denoiser.name} takes its guidance as an input, without a negative prompt; leave it out"
        )
    if negative is not None and denoiser.worse is not None:
        raise UserError(
            "a negative prompt is what guidance leads away from, and here that is a worse model; leave out "
            "one of the two"
        )
    if negative is not None and guidance == 1.0:
        raise UserError("a negative prompt is what guidance leads away from; give a guidance other than 1")


def described(prompts: Sequence[str]) -> dict[str, int | str]:
    """How a record names them: their number and sha256."""
    return {"count": len(prompts), "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()}


class PromptEmbeddings:
    """What a model is conditioned on for images 0 to n - 1, whose prompts are those given, in turn.

    size: height and width of the images. Each prompt is encoded once, all of them before the first image if
    they fit into `held` bytes: then the encoders are freed. Else those of each batch, with the encoders kept.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        prompts: Sequence[str],
        n: int,
        size: tuple[int, int] | None,
        held: int = HELD,
    ) -> None:
        self.conditioner, self.prompts, self.size = conditioner, prompts, size
        self._unique = list(dict.fromkeys(prompts[: max(1, n)]))
        self._place = {prompt: place for place, prompt in enumerate(self._unique)}
        one = sum(value.numel() * value.element_size() for value in conditioner.example.values())
        self._all: dict[str, Tensor] | None = None
        self._fits = one * len(self._unique) <= held

    def batch(self, start: int, stop: int) -> dict[str, Tensor]:
        """Of images start to stop - 1, on the CPU."""
        wanted = [self.prompts[i % len(self.prompts)] for i in range(start, stop)]
        if not self._fits:
            unique = list(dict.fromkeys(wanted))
            made = self.conditioner.embed(unique, self.size)
            places = [unique.index(prompt) for prompt in wanted]
        else:
            if self._all is None:
                self._all = self.conditioner.embed(self._unique, self.size)
                self.conditioner.close()
            made, places = self._all, [self._place[prompt] for prompt in wanted]
        chosen = torch.tensor(places)
        return {key: value[chosen] for key, value in made.items()}
