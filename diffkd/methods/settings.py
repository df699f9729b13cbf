"""Settings that several methods have, with their bounds and their help; a default is each method's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from diffkd.core.denoiser import StockSampler


def _ascending(given: tuple[float, float]) -> tuple[float, float]:
    if given[0] >= given[1]:
        raise ValueError(f"{[*given]} is no range of weights; give the least, then a larger one")
    return given


# least and largest of a guidance weight that is an input
Range = Annotated[
    tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]], AfterValidator(_ascending)
]

# students that are led along their teacher's trajectories
Teacher = Annotated[
    str, Field(description="the run's teacher, or previous for the last student, or a student's name")
]
Solver = Annotated[
    Literal["ddim", "heun", "dpmpp_2m"], Field(description="of the teacher's step from t to s")
]

# students whose own images are judged
Drawn = Annotated[
    StockSampler,
    Field(description="the student's sampler; ddim, as after progressive, learns through all steps"),
]
Simulate = Annotated[
    bool,
    Field(description="whether later steps start from the student's own images, or from noised data"),
]
Matched = Annotated[
    str,
    Field(description="whose distribution is matched: the run's teacher's, or previous, or a student's"),
]

# a fake network, and a discriminator's heads on it or on the teacher
Seen = Annotated[
    str,
    Field(description="whose features the heads see: the run's teacher's, or previous, or a student's"),
]
FakeRate = Annotated[float | None, Field(gt=0, description="of the fake network; default the student's")]
FakeGan = Annotated[
    float, Field(ge=0, description="weight of the discriminator's loss in the fake network's")
]
HeadsRate = Annotated[float | None, Field(gt=0, description="of its heads; default the fake network's")]
FakeBlocks = Annotated[
    list[str] | None,
    Field(min_length=1, description="the fake network's modules that have a head; default the middle block"),
]
R1 = Annotated[
    float, Field(ge=0, description="weight of the finite-noise R1 penalty on real images; 100 to 1000")
]
R1Noise = Annotated[float, Field(gt=0, description="standard deviation of that noise")]
