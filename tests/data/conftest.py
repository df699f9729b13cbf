"""Random images do not depend on the tests that ran before."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.helpers import RNG


@pytest.fixture(autouse=True)
def _reset_rng():
    RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state
