"""A student's pipeline in half precision: files of the variant fp16, as diffusers names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffkd.io.files import write_json
from diffkd.models import saving
from diffkd.models.exports import Student
from diffkd.models.pipeline_files import read_object

VARIANT = "fp16"
DTYPE = torch.float16  # reading it calls the network once, and refuses one that overflows
NEEDS: tuple[str, ...] = ()
TAKES = "which is for pipelines that draw in half precision"
INDEX_END = ".safetensors.index.json"


def fits(student: Student) -> bool:
    """All but those that stock has no pipeline for, and LDMPipeline, which draws its noise in float32."""
    family = saving.family_saving(student.denoiser)
    return family is not None and bool(family.PIPELINES) and "LDMPipeline" not in family.PIPELINES


def write(student: Student, folder: Path) -> dict[str, Any]:
    saving.save(student.denoiser, folder)
    for path in sorted(folder.glob("*/*.safetensors")):
        path.rename(path.with_name(named(path.name)))
    for index in sorted(folder.glob(f"*/*{INDEX_END}")):
        content = read_object(index)
        content["weight_map"] = {key: named(file) for key, file in content["weight_map"].items()}
        write_json(
            index.with_name(index.name.replace(INDEX_END, f".safetensors.index.{VARIANT}.json")), content
        )
        index.unlink()
    return {"export": {"dtype": "float16"}}


def named(file: str) -> str:
    """A file of weights with the variant in its name: before the number of a shard, or before the ending."""
    stem = file.removesuffix(".safetensors")
    head, dash, number = stem.partition("-0")  # of a shard: -00001-of-00002
    return f"{head}.{VARIANT}{dash}{number}.safetensors"
