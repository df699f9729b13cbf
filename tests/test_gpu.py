"""What only a CUDA device can show."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs

from diffkd.core.schedules import Schedule
from diffkd.errors import Interrupted
from diffkd.generation.encoding import read_image
from diffkd.generation.generator import generate
from diffkd.io.processes import Processes
from diffkd.methods.progressive import Progressive, target
from diffkd.metrics import Evaluation, Evaluator
from diffkd.metrics.evaluation.image_sets import parse
from diffkd.metrics.evaluation.image_stream import sampled_images
from diffkd.metrics.evaluation.reference import Reference
from diffkd.models import loading, students
from diffkd.training.config import Training
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage
from tests.methods.conformance import images
from tests.tiny import student
from tests.training.stages import run_one, weights

pytestmark = pytest.mark.gpu
COSINE = Schedule.cosine(64)


def test_the_gpu_draws_the_images_of_the_cpu():
    """From the same noise, made on the CPU: almost no pixel differs, and none by more than two levels."""
    denoiser = student(10, "v_prediction", COSINE)
    cpu = torch.cat(list(generate(denoiser, 32, seed=3))).int()
    gpu = torch.cat(list(generate(denoiser.to("cuda"), 32, seed=3))).cpu().int()
    assert (cpu - gpu).abs().max() <= 2 and (cpu != gpu).float().mean() < 0.02


def test_the_target_is_double_precision():
    teacher = student(None, "v_prediction", COSINE)
    x_t, t = torch.randn(8, 1, 8, 8), torch.arange(1, 9).double() / 8
    cpu = target(teacher, x_t, t, t - 1 / 8)
    gpu = target(teacher.to("cuda"), x_t.cuda(), t.cuda(), t.cuda() - 1 / 8)
    assert gpu.dtype == torch.float64 and (cpu - gpu.cpu()).abs().max() < 1e-2


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_stage_trains(tmp_path, precision):
    teacher = student(3, "v_prediction", COSINE).cuda()
    pupil = students.copy_of(teacher)
    before = weights(teacher)
    method = Progressive(steps=[4], updates=10, learning_rate=1e-3)
    run = RunFolder(tmp_path / "run", {})
    nets = {"student": pupil, "teacher": teacher.requires_grad_(False)}
    accelerator = Accelerator(mixed_precision=precision)
    run_stage(
        accelerator, method, method.stages(teacher)[0], nets, images(), Training(batch_size=8), run,
        seed=0, stage_index=0,
    )  # fmt: skip
    run.close()
    assert torch.equal(before, weights(teacher)) and not torch.equal(before, weights(pupil))
    assert weights(pupil).isfinite().all()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compiled_gradients_are_the_same(tmp_path):
    """torch 2.13 compiles a wrong backward pass of this network on CPUs; on GPUs it must be right."""
    plain = run_one(tmp_path / "plain", updates=3)[2]
    fast = run_one(tmp_path / "fast", updates=3, training=Training(batch_size=8, log_every=1, compile=True))[
        2
    ]
    for mine, theirs in zip(fast, plain, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)


def test_a_loss_scale_that_is_too_large_is_lowered_and_resumed(tmp_path):
    """fp16: the overflows with which the scaler finds its scale are not counted as skipped updates, and a
    resumed run starts from the scale that was found."""

    def one(folder, stop_at=None):
        AcceleratorState._reset_state()
        teacher = student(3, "v_prediction", COSINE).cuda()
        pupil = students.copy_of(teacher)
        method = Progressive(steps=[4], updates=60, learning_rate=1e-3)
        scaler = GradScalerKwargs(init_scale=2.0**40, growth_interval=1000)
        accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[scaler])
        run, done = RunFolder(folder, {}), [0]
        try:
            run_stage(
                accelerator, method, method.stages(teacher)[0],
                {"student": pupil, "teacher": teacher.requires_grad_(False)}, images(),
                Training(batch_size=8, precision="fp16", max_skipped=0), run, seed=0, stage_index=0,
                on_update=lambda update, record: done.append(update),
                should_stop=lambda: done[-1] + 1 == stop_at,
            )  # fmt: skip
            assert 1 <= accelerator.scaler.get_scale() < 2.0**40
        except Interrupted:
            return None
        finally:
            run.close()
            AcceleratorState._reset_state()
        return weights(pupil)

    whole = one(tmp_path / "whole")
    assert whole.isfinite().all()
    assert one(tmp_path / "parts", stop_at=45) is None
    assert torch.allclose(whole, one(tmp_path / "parts"), rtol=1e-3, atol=1e-5)


def test_an_update_synchronizes_once(tmp_path):
    """By an event, for its loss and gradient norm: torch raises at any other synchronization."""

    def on_update(done, record):
        torch.cuda.set_sync_debug_mode("error" if 2 <= done < 9 else "default")

    teacher = student(3, "v_prediction", COSINE).cuda()
    method = Progressive(steps=[4], updates=10)
    run = RunFolder(tmp_path / "run", {})
    try:
        run_stage(
            Accelerator(), method, method.stages(teacher)[0],
            {"student": students.copy_of(teacher), "teacher": teacher.requires_grad_(False)}, images(),
            Training(batch_size=8, log_every=10), run, seed=0, stage_index=0, on_update=on_update,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
        run.close()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("mode", ["graph", "compile", "auto"])
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_captured_sampling_equals_eager(mode, sampler):
    """Including a batch that is not full, and several replays of one graph."""
    denoiser = student(10, "v_prediction", COSINE).cuda()
    eager = torch.cat(list(generate(denoiser, 20, seed=3, batch_size=8, sampler=sampler, mode="eager"))).int()
    fast = torch.cat(list(generate(denoiser, 20, seed=3, batch_size=8, sampler=sampler, mode=mode))).int()
    assert (eager - fast).abs().max() <= 2 and (eager != fast).float().mean() < 0.02


def test_the_command_writes_the_images_of_the_gpu(make_pipeline, tmp_path, cli):
    """Through pinned buffers and worker processes: each file equals its image in the .npz."""
    folder = make_pipeline(tmp_path)
    options = ["-n", 50, "--steps", 2, "--batch-size", 16, "--device", "cuda", "--dtype", "float32"]
    assert cli("sample", folder, *options, "--out", tmp_path / "i", "--workers", 2).code == 0
    assert cli("sample", folder, *options, "--out", tmp_path / "i.npz").code == 0
    whole = np.load(tmp_path / "i.npz")["arr_0"]
    for i in range(50):
        assert np.array_equal(read_image(tmp_path / f"i/{i:06d}.png"), whole[i])


def test_evaluation_on_the_gpu_equals_the_cpu(make_pipeline, tmp_path):
    """The same images but for rounding; features and statistics stay on the device."""
    folder = make_pipeline(tmp_path)
    how = Evaluation(samples=200, batch_size=64, metrics=["fid", "kid", "is", "prdc"])
    found = {}
    for device in ("cpu", "cuda"):
        evaluator = Evaluator(how, Reference(parse("digits")), Processes(device))
        drawn = sampled_images(loading.load(folder, device=device), how, evaluator.reference, 4)
        found[device] = evaluator(drawn)
        assert evaluator.real["main"].statistics.mu.device.type == device
        assert found[device]["seconds"] > 0
    for key in ("fid", "kid", "is", "precision", "coverage"):
        assert found["cuda"][key] == pytest.approx(found["cpu"][key], rel=1e-2, abs=1e-2), key
