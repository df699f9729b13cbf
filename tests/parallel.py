"""A stage trained by several processes, for tests/forking.py.

Its argument is JSON of folder, world (how many processes they are), kind, method (one or two networks,
feature, whose projectors learn with a narrower student, or logits), updates, stop_at (the last of them is
told to). The main process leaves student.safetensors, and judge.safetensors, beside the run's own files.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import nn

from diffkd.core.classifier import Classifier
from diffkd.errors import Interrupted
from diffkd.methods.base import Loss
from diffkd.methods.feature import Feature
from diffkd.methods.logits import Logits
from diffkd.methods.progressive import Progressive
from diffkd.models import students
from diffkd.runs.classification.cnn import Arguments
from diffkd.training.config import Training
from diffkd.training.launch import make_accelerator
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage
from tests.tiny import student
from tests.training.test_trainer import COSINE, images

KINDS: dict[str, dict[str, str]] = {  # as configs/accelerate has it
    "copies": {},
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResnetBlock2D",
    },
    "deepspeed": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}  # fmt: skip


class Judge(nn.Module):
    """Says of images how large they should be."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.inner = nn.Conv2d(1, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 1, 3, padding=1)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.outer(self.inner(x).tanh())
        return found


class Two(Progressive):
    """Progressive distillation with a second network, through which the student's loss goes too."""

    def networks(self, teacher: Any, student: Any) -> dict[str, nn.Module]:
        return {"judge": Judge()}

    def losses(self, nets: Any, batch: Any, stage: Any, rng: torch.Generator) -> Any:
        for loss in super().losses(nets, batch, step, rng):
            t = torch.full((len(batch.x0),), 0.5, dtype=torch.float64)
            drawn = nets["student"](torch.randn(batch.x0.shape, generator=rng), t, **batch.cond)
            yield Loss("student", loss.value + 0.1 * nets["judge"](drawn).square().mean(), loss.metrics)
        yield Loss("judge", (nets["judge"](batch.x0) - batch.x0.mean()).square().mean())


METHODS = {"one": Progressive, "two": Two, "feature": Feature, "logits": Logits}


def models_of(method: str) -> tuple[Any, Any]:
    """A teacher, and a student that is smaller where the method is for such."""
    teacher = student(3, "v_prediction", COSINE)
    if method == "logits":
        torch.manual_seed(3)
        networks = [Arguments(channels=channels).build(1, 3, timed=False) for channels in ([8, 16], [4, 8])]
        return Classifier(networks[0], 3), Classifier(networks[1], 3)
    return teacher, students.narrow(teacher, [8, 8]) if method == "feature" else students.copy_of(teacher)


def work(options: dict[str, Any]) -> None:
    folder = Path(options["folder"])
    asked, fields = (
        options.get("method", "one"),
        {"updates": options.get("updates", 50), "learning_rate": 5e-4},
    )
    method = METHODS[asked](**fields, **({} if asked in ("feature", "logits") else {"steps": [4]}))
    training = Training(batch_size=16, micro_batches=4, log_every=7, checkpoint_every=10)
    accelerator = make_accelerator(training)
    kind = {DistributedType.FSDP: "fsdp", DistributedType.DEEPSPEED: "deepspeed"}
    found = (accelerator.num_processes, kind.get(accelerator.distributed_type, "copies"))
    assert found == (options["world"], options.get("kind", "copies")), found
    teacher, pupil = models_of(asked)
    pupil.requires_grad_(True)
    nets = {"student": pupil, "teacher": teacher.requires_grad_(False), **method.networks(teacher, pupil)}
    run = RunFolder(folder, {}, owner=accelerator.is_main_process)
    done = [0]
    last = accelerator.process_index == accelerator.num_processes - 1
    try:
        run_stage(
            accelerator, method, method.stages(teacher)[0], nets, images(), training, run,
            seed=0, stage_index=0, on_update=lambda update, record: done.append(update),
            should_stop=lambda: last and done[-1] + 1 == options.get("stop_at"),
        )  # fmt: skip
    except Interrupted:
        return
    finally:
        run.close()
    if accelerator.is_main_process:
        save_file(pupil.network.state_dict(), folder / "student.safetensors")
        if "judge" in nets and found[1] == "copies":
            save_file(nets["judge"].state_dict(), folder / "judge.safetensors")


def main() -> None:
    options = json.loads(sys.argv[1])
    os.environ |= KINDS[options.get("kind", "copies")]
    work(options)
