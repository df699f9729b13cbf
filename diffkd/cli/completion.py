"""What the shell completes beside commands and options: one of a few words, or the value of a config key.

Nothing here imports the objects that the words are of, which would take seconds at every press of a key; a
test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import typer

NO_METHODS = ("base", "settings")  # files among the methods that are none
SAMPLERS = ("ddim", "heun", "dpmpp_2m", "ancestral", "renoise")
TOOLS = ("pytorch-fid", "clean-fid", "torch-fidelity", "edm", "adm")
FEATURES = ("inception", "digits", "shapes", "dinov2", "clip")
RESIZES = ("tf1", "clean", "pytorch-fid", "torchmetrics")
METRICS = (
    "fid", "class_fid", "kid", "is", "prdc", "fd_inf", "fd_dino", "cmmd", "clip_score", "prompt_accuracy",
    "agreement",
)  # fmt: skip


def method_names() -> list[str]:
    """Of the built-in methods, by their files."""
    folder = Path(__file__).parents[1] / "methods"
    return sorted(file.stem for file in folder.glob("[a-z]*.py") if file.stem not in NO_METHODS)


VALUES: dict[str, tuple[str, ...]] = {  # of config keys, without the numbers that index lists
    "method.name": tuple(method_names()),
    "method.sampler": SAMPLERS,
    "student.kind": ("copy", "lora", "drop_blocks", "narrow", "from_config"),
    "data.kind": ("digits", "shapes", "folder", "datasets", "prompts", "none"),
    "prediction": ("v_prediction", "epsilon", "sample"),
    "training.precision": ("float32", "bf16", "fp16"),
    "training.optimizer": ("adamw", "adamw_8bit"),
    "evaluation.protocol": ("coco30k", *TOOLS),
    "evaluation.features": FEATURES,
    "evaluation.resize": RESIZES,
    "evaluation.sampler": SAMPLERS,
}


def among(*words: str) -> Callable[[str], list[str]]:
    """What completes an option that takes one of these words, or several with commas between them."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{word}" for word in words if word.startswith(last)]

    return complete


def override(ctx: typer.Context, incomplete: str) -> list[str]:
    """What completes the value in key.sub=value. Bash splits words at the = sign, other shells do not."""
    given = [*(ctx.params.get("overrides") or ())]
    key, equals, value = incomplete.partition("=")
    if equals:
        before = f"{key}="
    else:
        before, value = "", incomplete
        if given[-1:] == ["="]:
            given.pop()
        key = given[-1] if given else ""
    words = VALUES.get(re.sub(r"\.\d+(?=\.|$)", "", key), ())
    return [f"{before}{word}" for word in words if word.startswith(value)]
