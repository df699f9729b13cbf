"""What only a CUDA device can show."""

import pytest
import torch
from accelerate import Accelerator

from diffkd import models, students
from diffkd.engine import Training, run_stage
from diffkd.generation import generate
from diffkd.methods.progressive import Progressive, target
from diffkd.metrics import Evaluation, Evaluator
from diffkd.metrics.processes import Processes
from diffkd.metrics.reference import Reference
from diffkd.metrics.sources import parse
from diffkd.metrics.targets import model_target
from diffkd.runs import Run
from diffkd.schedules import Schedule
from tests.test_engine import images, weights
from tests.test_models import student

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
COSINE = Schedule.cosine(64)


def test_the_gpu_draws_the_cpus_pictures():
    """From the same noise, which is made on the CPU: at most a grey level apart, nearly nowhere."""
    denoiser = student(10, "v_prediction", COSINE)
    cpu = torch.cat(list(generate(denoiser, 32, seed=3))).int()
    gpu = torch.cat(list(generate(denoiser.to("cuda"), 32, seed=3))).cpu().int()
    assert (cpu - gpu).abs().max() <= 2 and (cpu != gpu).float().mean() < 0.02


def test_the_target_is_double_precision_there_too():
    teacher = student(None, "v_prediction", COSINE)
    x_t, t = torch.randn(8, 1, 8, 8), torch.arange(1, 9).double() / 8
    cpu = target(teacher, x_t, t, t - 1 / 8)
    gpu = target(teacher.to("cuda"), x_t.cuda(), t.cuda(), t.cuda() - 1 / 8)
    assert gpu.dtype == torch.float64 and (cpu - gpu.cpu()).abs().max() < 1e-2


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_stage_learns_there(tmp_path, precision):
    teacher = student(3, "v_prediction", COSINE).cuda()
    pupil = students.copy_of(teacher)
    before = weights(teacher)
    method = Progressive(steps=[4], updates=10, learning_rate=1e-3)
    run = Run(tmp_path / "run", {})
    nets = {"student": pupil, "teacher": teacher.requires_grad_(False)}
    accelerator = Accelerator(mixed_precision=precision)
    run_stage(
        accelerator, method, method.stages(teacher)[0], nets, images(), Training(batch_size=8), run,
        seed=0, stage_index=0,
    )  # fmt: skip
    run.close()
    assert torch.equal(before, weights(teacher)) and not torch.equal(before, weights(pupil))
    assert weights(pupil).isfinite().all()


def test_evaluation_on_the_gpu_is_the_one_on_the_cpu(make_pipeline, tmp_path):
    """The same images but for rounding, and features and statistics that never leave the device."""
    folder = make_pipeline(tmp_path)
    how = Evaluation(samples=200, batch_size=64, metrics=["fid", "kid", "is", "prdc"])
    found = {}
    for device in ("cpu", "cuda"):
        evaluator = Evaluator(how, Reference(parse("digits")), Processes(device))
        drawn = model_target(models.load(folder, device=device), how, evaluator.reference, 4)
        found[device] = evaluator(drawn)
        assert evaluator.real["main"].statistics.mu.device.type == device
        assert found[device]["seconds"] > 0
    for key in ("fid", "kid", "is", "precision", "coverage"):
        assert found["cuda"][key] == pytest.approx(found["cpu"][key], rel=1e-2, abs=1e-2), key
