"""Environment variables that reach a run's training: what accelerate and torch read besides its config.

A launcher says how many processes there are, where they are and how they share the work; the config says all
that changes the student. `accelerate launch` hands on its own config file by the variables here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from diffkd.errors import UserError
from diffkd.io.text import quoted

OFF = ("", "0", "no", "n", "none", "false", "f", "off")


class _Setting(NamedTuple):
    """remedy: what does the same, or why nothing does. harmless: values that change nothing, lower case."""

    remedy: str
    harmless: tuple[str, ...] = OFF


_SHARDS = "configs/accelerate/fsdp2.yaml divides a network among GPUs"
_EXACT = "training.precision says what is computed in less than float32"
REFUSED = {  # nothing can overrule them, or they are another way of training
    "ACCELERATE_USE_MEGATRON_LM": _Setting(_SHARDS),
    "ACCELERATE_USE_PARALLELISM_CONFIG": _Setting(_SHARDS),
    "ACCELERATE_USE_TP": _Setting(_SHARDS),  # of older accelerates, as the next
    "ACCELERATE_USE_IPEX": _Setting(_EXACT),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": _Setting("configs/accelerate/deepspeed-zero2.yaml has what is known"),
    "ACCELERATE_FP8_BACKEND": _Setting(_EXACT),
    "FSDP_IGNORED_MODULES": _Setting("their gradients would differ from process to process"),
    "ONEDNN_DEFAULT_FPMATH_MODE": _Setting(_EXACT, (*OFF, "strict")),
    "DNNL_DEFAULT_FPMATH_MODE": _Setting(_EXACT, (*OFF, "strict")),
    "PYTORCH_MPS_FAST_MATH": _Setting(_EXACT),
}
OVERRULED = {  # by what make_accelerator passes; DeepSpeed's by `Zero`
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _Setting("training.micro_batches", (*OFF, "1", "auto")),
    "ACCELERATE_MIXED_PRECISION": _Setting("training.precision"),
    "ACCELERATE_DYNAMO_BACKEND": _Setting("training.compile"),
    "ACCELERATE_GRADIENT_CLIPPING": _Setting("training.max_grad_norm", (*OFF, "auto")),
}
ROUNDING = (  # these choose among kernels, and so change the last bits: a run records them
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_MAX_CPU_ISA", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE", "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT",
)  # fmt: skip


def check(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError for a variable that would change the student."""
    for name, setting in REFUSED.items():
        if environment.get(name, "").lower() not in setting.harmless:
            raise UserError(
                f"the environment variable {name} is {quoted(environment[name])}, which would change the "
                f"student; unset it, or take it out of accelerate's config: {setting.remedy}"
            )


def overruled(precision: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each variable that says something else than the config does, and means nothing.

    precision: accelerate's word for the config's.
    """
    return [
        f"{name}={environment[name]} has no effect: {setting.remedy} of the run's config decides"
        for name, setting in OVERRULED.items()
        if environment.get(name, "").lower() not in (*setting.harmless, precision)
    ]


def rounding(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those of ROUNDING that are set."""
    return {name: environment[name] for name in ROUNDING if name in environment}
