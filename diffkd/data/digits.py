"""The digits dataset of scikit-learn."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.io.config import Strict


class Digits(Strict):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey (extra `digits`)."""

    kind: Literal["digits"]

    def load(self) -> Images:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise UserError(
                "data kind digits needs scikit-learn; install it with pip install scikit-learn"
            ) from error
        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
        return Images("digits", pixels, torch.from_numpy(digits.target).long(), [str(d) for d in range(10)])
