"""scripts/bench_training.py compares like with like: a method's minimum has the passes of its update."""

import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from diffkd import methods
from diffkd.training.config import Training
from tests.methods.conformance import COSINE, images
from tests.tiny import student

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import stages  # noqa: E402
from comparison.cost import ATTENTION  # noqa: E402
from minimums import SETTINGS, Bare  # noqa: E402

BATCH = 16


@pytest.mark.parametrize("name", SETTINGS)
def test_a_minimum_has_the_passes_of_an_update(name):
    """By their arithmetic. Shares of a batch differ by one example, as they are drawn."""
    teacher = student(4, "v_prediction", COSINE, sampler="renoise", seed=1)
    teacher.num_classes, teacher.null_label = 3, 3
    fewer = {"fake_updates": 2} if "fake_updates" in methods.find(name).model_fields else {}
    method = methods.find(name)(**SETTINGS[name], **fewer, updates=1)
    stage = method.stages(teacher)[0]
    nets = stages.networks_of(method, stage, teacher)
    minimum = Bare(method, nets, BATCH, "float32")
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as bare:
        minimum.update()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as ours:
        stages.train(method, stage, nets, images(), Training(batch_size=BATCH))
    assert ours.get_total_flops() == pytest.approx(bare.get_total_flops(), rel=0.03)
