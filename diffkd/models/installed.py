"""What the installed diffusers calls things that it called otherwise before."""

from __future__ import annotations


def dtype_argument() -> str:
    """Of from_pretrained: the dtype of what it reads."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
