"""A student's network for ONNX Runtime: inputs and output by name, batches of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    names = [*facts["inputs"]]
    with program.silent():
        torch.onnx.export(
            program.traced(student), f=folder / FILE, input_names=names, output_names=[program.OUTPUT],
            dynamo=True, verbose=False, external_data=True,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])

    def run(sample: Tensor, timestep: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        given = {program.SAMPLE: sample, program.TIME: timestep, **(cond or {})}
        (output,) = session.run([program.OUTPUT], {key: value.numpy() for key, value in given.items()})
        return torch.from_numpy(output)

    program.check_same(student, run, BOUND)
    return {"export": facts}
