"""What configs and docs say of the cost of large runs is the arithmetic of their stages."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import DDPMScheduler

from diffkd.core.schedules import from_diffusers
from diffkd.methods.progressive import Progressive
from diffkd.runs.config import Distill
from diffkd.runs.config_files import load

ROOT = Path(__file__).parents[2]
CALL, WHOLE = r"call of the \w+ is ([\d.]+e\d+) operations", r"whole ([\d.]+e\d+),"
STAGES = "docs/text-to-image.md"


@pytest.mark.parametrize(
    ("config", "prediction", "page"),
    [
        ("sd15/progressive", "epsilon", STAGES),
        ("dit/progressive", "epsilon", None),
        ("pixart/progressive", "epsilon", None),
        ("sana/progressive", "flow", None),
        ("sd3/progressive", "flow", None),
        ("flux/progressive", "flow", None),
        ("flux/schnell", "flow", None),
    ],
)
def test_the_operations_of_a_run_are_those_of_its_stages(config, prediction, page):
    """An image of an update costs three calls for the student, and one for each question to its teacher. The
    stage of an epsilon teacher bakes the guidance in, so that the first sub-steps are one question each."""
    settings = load(ROOT / f"configs/{config}.yaml", Distill)
    (method,) = settings.method
    assert isinstance(method, Progressive)
    schedule = from_diffusers(DDPMScheduler())
    teacher = SimpleNamespace(prediction=prediction, schedule=schedule, check_guidance=lambda: None)
    calls = 0
    for stage in method.stages(teacher):
        calls += stage.updates * (3 + stage.substeps * (1 if stage.guidance == 1 else 2))
    text = (ROOT / (page or f"configs/{config}.yaml")).read_text(encoding="utf-8")
    whole = r"`configs/sd15/progressive.yaml` is about ([\d.]+e\d+) operations" if page else WHOLE
    call, said = (float(re.search(pattern, text)[1]) for pattern in (CALL, whole))
    assert said == pytest.approx(call * settings.training.batch_size * calls, rel=0.04)
