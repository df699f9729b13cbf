"""FID: the Fréchet distance with what a finite sample does to it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from diffkd.metrics.base import FeatureSet, Inputs, Metric, Value
from diffkd.metrics.features import STANDARD_SAMPLES
from diffkd.metrics.frechet import distance
from diffkd.metrics.sampling_error import LEAST_DRAWS, bootstrap, floor
from diffkd.metrics.tool_distances import SINGLE_MEAN, Tool, tool_distance

MOST_DRAWS = 100_000  # of an interval; beyond, a slip


def _resamplings(count: int) -> int:
    if 0 < count < LEAST_DRAWS:
        raise ValueError(f"bootstrap is {count}: one resampling has no spread; use 0 for none, 200 is usual")
    return count


class Fid(Metric):
    """Fréchet distance; with few images the distance to expect of fresh data, on request an interval."""

    name: ClassVar[str] = "fid"
    values: ClassVar[tuple[Value, ...]] = (Value("fid", "FID", ".3f", ("fid_low", "fid_high")),)
    more: ClassVar[tuple[str, ...]] = ("fid_std",)

    bootstrap: Annotated[int, AfterValidator(_resamplings)] = Field(
        0, ge=0, le=MOST_DRAWS, description="resamplings for FID's 95% interval; 0 for none"
    )

    fid_as: Tool | None = Field(
        None, description="the tool by whose arithmetic FID is; default an exact root"
    )

    @property
    def stores_images(self) -> bool:
        return self.bootstrap > 0 or self.prefers_reference

    @property
    def prefers_reference(self) -> bool:
        return self.fid_as in SINGLE_MEAN

    def options(self, samples: int, reference: int | None) -> dict[str, Any]:
        return {} if self.fid_as is None else {"as": self.fid_as}

    def compute(self, inputs: Inputs) -> dict[str, float | None]:
        images, reference = inputs.images, inputs.reference
        if self.fid_as is None:
            found = distance(images.gaussian, reference.gaussian)
        else:
            found = tool_distance(self.fid_as, images, reference)
        values: dict[str, float | None] = {"fid": found}
        expected = self._floor(images, reference, inputs.features)
        if expected is not None:
            values["fid_floor"] = expected
        if self.bootstrap:
            interval = bootstrap(images.features, reference.gaussian, draws=self.bootstrap)
            values |= {"fid_low": interval.low, "fid_high": interval.high, "fid_std": interval.std}
        return values

    def _floor(self, images: FeatureSet, reference: FeatureSet, features: str) -> float | None:
        """The FID that fresh data would have with so few images; None where they are not few."""
        samples, real = images.statistics.num_samples or 0, reference.statistics
        standard = (features == "digits" and real.num_samples) or STANDARD_SAMPLES
        if samples >= standard and samples >= real.num_features:
            return None
        if samples not in reference.cache:
            factor = reference.gaussian.factor
            narrow = factor.shape[1] < len(factor)  # factorᵀ factor has sigma's eigenvalues, but for zeros
            same = factor.T @ factor if narrow else real.sigma
            reference.cache[samples] = floor(same, samples, real.num_samples)
        found: float = reference.cache[samples]
        return found
