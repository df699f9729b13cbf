"""A stage trained by several processes, for tests/forking.py.

Its argument is JSON of folder, world (how many processes there are), kind, method (one of METHODS or of
VARIANTS, or any other by its name; all but the first have the networks of tests/methods/conformance.py),
updates, stop_at (asked of the last process alone), training (settings). The main process leaves
NAME.safetensors of each network but the teacher beside the run's own files.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule

from diffkd import methods
from diffkd.core import adapters, interval
from diffkd.core.classifier import Classifier, Model
from diffkd.core.denoiser import Denoiser
from diffkd.errors import Interrupted
from diffkd.methods.base import Method
from diffkd.methods.dmd2 import DMD2
from diffkd.methods.feature import Feature
from diffkd.methods.logits import Logits
from diffkd.methods.progressive import Progressive
from diffkd.methods.shortcut import Shortcut
from diffkd.models import students
from diffkd.models.families import sd
from diffkd.models.students.config import Lora
from diffkd.models.unet import to_fast
from diffkd.runs.classification.cnn import Arguments
from diffkd.training.config import Training
from diffkd.training.launch import make_accelerator
from diffkd.training.run_folder import RunFolder
from diffkd.training.sharding import unsharded
from diffkd.training.trainer import run_stage
from tests import text_to_image
from tests.methods.conformance import COSINE, examples, nets_of
from tests.methods.variants import VARIANTS
from tests.tiny import student
from tests.two_networks import TwoNetworks

WRAPPED = ("BasicTransformerBlock", "ResnetBlock2D")
KINDS: dict[str, dict[str, str]] = {  # as configs/accelerate has it
    "copies": {},
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": ",".join(WRAPPED),
    },
    "deepspeed": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}  # fmt: skip


METHODS: dict[str, Method] = {
    "one": Progressive(steps=[4]), "two": TwoNetworks(), "feature": Feature(), "logits": Logits(),
    "sd": Progressive(steps=[4]), "xl": Progressive(steps=[4]),
    "lora": Progressive(steps=[4]), "lora-dmd2": DMD2(fake_updates=1),
    "lora-shortcut": Shortcut(target_decay=0.5, share=0.5),
}  # fmt: skip


def method_of(name: str) -> Method:
    return {**METHODS, **VARIANTS}.get(name) or methods.find(name)()


def models_of(name: str) -> dict[str, Any]:
    """A teacher, and a student that is smaller if the method is for such; what the method adds."""
    if name not in METHODS:
        return nets_of(method_of(name))
    teacher: Any = student(3, "v_prediction", COSINE)
    if name in ("sd", "xl"):
        torch.manual_seed(3)
        unet = to_fast(text_to_image.network(xl=name == "xl"))
        teacher = Denoiser(unet, COSINE, "v_prediction", call=sd.call)
    if name.startswith("lora"):
        Lora(kind="lora", rank=4).mark(teacher)
    if name == "logits":
        torch.manual_seed(3)
        networks = [Arguments(channels=channels).build(1, 3, timed=False) for channels in ([8, 16], [4, 8])]
        teacher, pupil = Classifier(networks[0], 3), Classifier(networks[1], 3)
    else:
        pupil = students.narrow(teacher, [8, 8]) if name == "feature" else students.copy_of(teacher)
    if name == "lora-shortcut":
        interval.attach(pupil.network)
    nets = {"student": pupil.requires_grad_(True), "teacher": teacher.requires_grad_(False)}
    nets |= METHODS[name].networks(teacher, pupil)
    generator = torch.Generator().manual_seed(4)
    for parameter in [p for net in nets.values() for p in adapters.own(net).values()]:
        # where all begin as the teacher, dmd2 learns from a difference of roundings
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return nets


class Captioned:
    """Latents and embeddings of 64 captions, random."""

    def __init__(self, *, xl: bool) -> None:
        self.latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(9))
        self.cond = text_to_image.conditions(64, xl=xl)

    def indices(self, size: int, rng: torch.Generator) -> torch.Tensor:
        return torch.randint(64, (size,), generator=rng)

    def batch(self, size: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen = self.indices(size, rng)
        return self.latents[chosen], {key: value[chosen] for key, value in self.cond.items()}


def check_wrapped(network: nn.Module) -> None:
    """In shards, every block is gathered by itself."""
    for module in network.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        assert isinstance(module, FSDPModule) or not kinds.intersection(WRAPPED), kinds


def work(options: dict[str, Any]) -> None:
    folder = Path(options["folder"])
    name = options.get("method", "one")
    method, nets = method_of(name), models_of(name)
    stage = replace(method.stages(nets["teacher"])[0], updates=options.get("updates", 50), learning_rate=5e-4)
    training = Training(
        **{
            "batch_size": 16, "micro_batches": 4, "log_every": 7, "checkpoint_every": 10,
            **options.get("training", {}),
        }
    )  # fmt: skip
    accelerator = make_accelerator(training)
    kind = {DistributedType.FSDP: "fsdp", DistributedType.DEEPSPEED: "deepspeed"}
    found = (accelerator.num_processes, kind.get(accelerator.distributed_type, "copies"))
    assert found == (options["world"], options.get("kind", "copies")), found
    run = RunFolder(folder, {}, owner=accelerator.is_main_process)
    done = [0]
    data = Captioned(xl=name == "xl") if name in ("sd", "xl") else examples(method, stage)
    last = accelerator.process_index == accelerator.num_processes - 1

    def on_update(update: int, record: dict[str, Any]) -> None:
        done.append(update)
        if accelerator.distributed_type == DistributedType.FSDP:
            check_wrapped(nets["student"].network)

    try:
        run_stage(
            accelerator, method, stage, nets, data, training, run,
            seed=0, stage_index=0, on_update=on_update,
            should_stop=lambda: last and done[-1] + 1 == options.get("stop_at"),
        )  # fmt: skip
    except Interrupted:
        return
    finally:
        run.close()
    for name, net in nets.items():
        if name == "teacher":
            continue
        if isinstance(net, Model):  # whole in the main process
            weights = adapters.state(net.network) if accelerator.is_main_process else {}
        else:
            weights = {key: unsharded(value, accelerator) for key, value in net.state_dict().items()}
        if accelerator.is_main_process:
            save_file(weights, folder / f"{name}.safetensors")


def main() -> None:
    options = json.loads(sys.argv[1])
    os.environ |= KINDS[options.get("kind", "copies")]
    work(options)
