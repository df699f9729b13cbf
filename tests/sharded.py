"""tests/parallel.py, watched: what a checkpoint holds and costs, what an update exchanges.

Its argument is that of tests/parallel.py with, beside it, network ("digits": that of the digits student),
strike (rank, and the number of the checkpoint amid whose writing that process is killed). Each process leaves
`watched-RANK.json`: saved, the bytes that it wrote of each checkpoint; exchanged, those of each checkpoint by
collective; updates, those of each update; state, the bytes of weights, moments and average that it holds;
rest, those of the weights in no block that is gathered by itself; peak, of its memory above the start. The
main one leaves the whole tensors of its state, `gathered.safetensors` when it was last saved and
`restored.safetensors` when it was restored.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from diffkd.io.environment import peak_rss
from diffkd.training import checkpoints, trainer
from diffkd.training.learner import Learner
from tests import parallel
from tests.exchanges import Exchanges

SCRIPTS = Path(__file__).parents[1] / "scripts"


def whole(learners: dict[str, Learner]) -> dict[str, Tensor]:
    """All that a checkpoint holds of the learners, gathered by the main process."""
    found = {}
    for name, learner in learners.items():
        with patch.object(type(learner), "_copied", Learner._copied):
            kinds = learner.tensors()
        found |= {f"{name}/{kind}/{key}": v for kind, values in kinds.items() for key, v in values.items()}
    return found


def held(learner: Learner) -> int:
    """Bytes of what a process holds of a learner's weights, moments and average."""
    tensors = [*learner.bare.parameters(), *(value for _, value in learner._moments())]
    tensors += learner.average.shadow_params if learner.average else []
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def outside(network: nn.Module) -> int:
    """Bytes of the weights in no block that FSDP2 gathers by itself."""
    blocks = tuple(
        f"{name}." for name, one in network.named_modules() if name and isinstance(one, FSDPModule)
    )
    return sum(4 * p.numel() for name, p in network.named_parameters() if not name.startswith(blocks))


def watch(options: dict[str, Any]) -> None:
    folder, rank = Path(options["folder"]), int(os.environ.get("RANK", 0))
    before = psutil.Process().memory_info().rss
    seen: dict[str, Any] = {"saved": [], "exchanged": [], "updates": [], "state": 0}
    save, restore, run_update = trainer.save, trainer.restore, trainer.run_update
    keep = checkpoints.Checkpoints.save
    strike = options.get("strike")

    def kept(self: Any, stage: int, update: int, tensors: Any, state: Any, *team: Any) -> None:
        seen["saved"].append(sum(value.nbytes for values in tensors.values() for value in values.values()))
        keep(self, stage, update, tensors, state, *team)

    def saved(accelerator: Any, run: Any, index: int, done: int, state: Any) -> None:
        with Exchanges() as exchanges:
            save(accelerator, run, index, done, state)
        seen["exchanged"].append(dict(exchanges.bytes))
        gathered = whole(state.learners)
        if accelerator.is_main_process:
            save_file(gathered, folder / "gathered.safetensors")

    def restored(accelerator: Any, run: Any, index: int, state: Any) -> int:
        done = restore(accelerator, run, index, state)
        gathered = whole(state.learners)
        if accelerator.is_main_process and done:
            save_file(gathered, folder / "restored.safetensors")
        return done

    def updated(accelerator: Any, parts: Any, state: Any, *args: Any) -> Any:
        with Exchanges() as exchanges:
            outcome = run_update(accelerator, parts, state, *args)
        seen["updates"].append(dict(exchanges.bytes))
        seen["state"] = sum(map(held, state.learners.values()))
        seen["rest"] = sum(outside(learner.bare) for learner in state.learners.values())
        return outcome

    def synced(path: Path) -> None:
        if strike == [rank, len(seen["saved"])]:
            os.kill(os.getpid(), signal.SIGKILL)

    with (
        patch.object(checkpoints.Checkpoints, "save", kept),
        patch.object(checkpoints, "sync", synced),
        patch.multiple(trainer, save=saved, restore=restored, run_update=updated),
    ):
        parallel.work(options)
    seen["peak"] = peak_rss() - before
    (folder / f"watched-{rank}.json").write_text(json.dumps(seen))


def main() -> None:
    options = json.loads(sys.argv[1])
    os.environ |= parallel.KINDS[options.get("kind", "copies")]
    if options.get("network") == "digits":
        sys.path.append(str(SCRIPTS))
        import networks

        parallel.student = lambda *args, **kwargs: networks.digits()  # type: ignore[assignment]
    watch(options)
