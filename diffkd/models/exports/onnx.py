"""A student's network for ONNX Runtime: inputs and output by name, batches of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import reason
from diffkd.models.exports import Student, program

FILE = "network.onnx"
DTYPE = torch.float32
NEEDS: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
TAKES = "which is for networks that torch.export traces"
BOUND = 1e-4  # of what it computes
fits = program.fits


def write(student: Student, folder: Path) -> dict[str, Any]:
    """The graph, and beside it, in a file of its own, the weights."""
    import onnxruntime

    facts = program.write_beside(student, folder)
    found = _without_idle_squeezes(program.traced(student))
    try:
        with program.silent():
            torch.onnx.export(
                found, f=folder / FILE, input_names=[*facts["inputs"]], output_names=[program.OUTPUT],
                dynamo=True, verbose=False, external_data=True,
                optimize=False,  # which makes NaN of SANA, and ONNX Runtime does when it reads the graph
            )  # fmt: skip
            session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    except Exception as error:  # torch and ONNX Runtime raise many types
        raise UserError(
            f"{student.name} does not go into ONNX ({reason(error)}); use --to torch-export"
        ) from error

    def run(sample: Tensor, timestep: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        given = {program.SAMPLE: sample, program.TIME: timestep, **(cond or {})}
        (output,) = session.run([program.OUTPUT], {key: value.numpy() for key, value in given.items()})
        return torch.from_numpy(output)

    program.check_same(student, run, BOUND)
    return {"export": facts}


def _without_idle_squeezes(found: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without what removes a dimension that is not 1, as PixArt has it: idle in torch, wrong in ONNX."""
    for node in [*found.graph.nodes]:
        if node.target is torch.ops.aten.squeeze.dim:
            given, dim = node.args
            if given.meta["val"].shape[dim] != 1:
                node.replace_all_uses_with(given)
                found.graph.erase_node(node)
    found.graph_module.recompile()
    return found
