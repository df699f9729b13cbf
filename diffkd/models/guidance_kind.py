"""The kind of a teacher's guidance, as configs and options give it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from diffkd.core.denoiser import Denoiser
from diffkd.core.guidance import Kind
from diffkd.core.guidance_kinds import in_words, set_kind
from diffkd.errors import UserError
from diffkd.io.config import Strict, validation_message
from diffkd.io.naming import called

OPTIONS = ("guidance_interval", "guidance_rescale", "worse")  # of commands and in Python


class GuidanceKind(Strict):
    """Guidance of another kind than the plain one, of a teacher; the weight is given where it always is."""

    interval: tuple[float, float] | None = Field(
        None, description="least and largest noise level sigma / alpha at which there is guidance"
    )
    rescale: float = Field(
        0.0, description="share of the guided output brought to the deviation of the unguided one, 0 to 1"
    )
    worse: str | None = Field(
        None, description="a worse model, folder or hub id, that guidance leads away from (autoguidance)"
    )

    @field_validator("interval")
    @classmethod
    def _range(cls, given: tuple[float, float] | None) -> tuple[float, float] | None:
        return Kind(interval=given).interval

    @field_validator("rescale")
    @classmethod
    def _share(cls, given: float) -> float:
        return Kind(rescale=given).rescale

    @model_validator(mode="after")
    def _says_something(self) -> GuidanceKind:
        if self.interval is None and not self.rescale and self.worse is None:
            raise ValueError(
                "a kind of guidance is an interval, a rescale above 0 or a worse model; give one of them, or "
                "leave it out"
            )
        return self

    def __str__(self) -> str:
        given = self.model_dump()
        return in_words(given | {"worse": None if self.worse is None else {"path": self.worse}})

    def set_on(self, denoiser: Denoiser) -> None:
        """Gives it to a model; loads the worse one beside it, on its device and in its dtype. Raises
        UserError as `set_kind`."""
        from diffkd.models import loading  # which takes seconds to import

        worse = None
        if self.worse is not None:
            worse = loading.load(self.worse, device=denoiser.device, dtype=denoiser.dtype)
            null = denoiser.null_label
            if null is not None and worse.null_label is None and worse.num_classes == null + 1:
                loading.set_null_label(worse, null)  # named for the model, whose config does not say it
        set_kind(denoiser, interval=self.interval, rescale=self.rescale, worse=worse)

    def check_weights(self, weights: Sequence[float | None], key: str = "guidance") -> None:
        """Raises UserError where it does nothing, as no weight is other than 1. key: of the weights."""
        if all(weight in (None, 1) for weight in weights):
            raise UserError(
                f"a kind of guidance ({self}) does nothing with weight 1; give a {called(key)} other than 1, "
                "or leave the kind out"
            )


def of_options(
    interval: Sequence[float] | None, rescale: float | None, worse: str | None
) -> GuidanceKind | None:
    """That of the options of a command, or arguments in Python, by the names in OPTIONS; None without any.
    Raises UserError for what `GuidanceKind` refuses."""
    values: dict[str, Any] = {"interval": interval, "rescale": rescale, "worse": worse}
    given = {key: value for key, value in values.items() if value is not None}
    if not given:
        return None
    try:
        return GuidanceKind.model_validate(given)
    except ValidationError as error:
        raise UserError(validation_message(error, GuidanceKind)) from error
