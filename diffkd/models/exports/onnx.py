"""A student's network for ONNX Runtime: inputs and output by name, batches of any size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.system_errors import chain, system_error
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
            _name_batch(folder / FILE)
            session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    except Exception as error:  # torch and ONNX Runtime raise many types
        if system_error(error) is not None:
            raise
        first = [*chain(error)][-1]  # the others say in which of its steps torch was
        raise UserError(
            f"{student.name} does not go into ONNX ({reason(first)[:200]}); use --to torch-export"
        ) from error

    def run(sample: Tensor, timestep: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        given = {program.SAMPLE: sample, program.TIME: timestep, **(cond or {})}
        (output,) = session.run([program.OUTPUT], {key: value.numpy() for key, value in given.items()})
        return torch.from_numpy(output)

    program.check_same(student, run, BOUND)
    return {"export": facts}


def _name_batch(path: Path) -> None:
    """Gives the free size of inputs and output, a symbol of torch's, the name that their card has for it."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{symbol}\b", program.BATCH, dim.dim_param)
    onnx.save(model, path)


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
