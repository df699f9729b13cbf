"""The rooms run one way, nothing is unpickled, and the command's help costs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffkd

ROOT = Path(diffkd.__file__).parent
ROOMS = (
    "errors", "io", "core", "data", "models", "methods", "training", "generation", "metrics", "runs", "cli",
)  # fmt: skip  # each imports only from those before it
FORBIDDEN = {
    "torchvision",
    "torch_fidelity",
    "scipy",
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
}
UNPICKLERS = {
    ("torch", "load"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("diffkd", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_of(path) for path in FILES}


def imported(source: str, modules: set[str] = MODULES) -> set[str]:
    """The modules that a source imports, at its top or inside a function; of diffkd down to the submodule."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "house style is absolute imports"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def backward(source: str, module: str, modules: set[str] = MODULES) -> list[str]:
    """What a module imports from a room that is not above its own, or a method from another method."""
    wrong = []
    for other in sorted(imported(source, modules)):
        if not other.startswith("diffkd.") or other == module:
            continue
        here, there = room(module), room(other)
        shared = {"diffkd.methods", "diffkd.methods.base", "diffkd.methods.settings"}
        another_method = here == there == "methods" and other not in shared
        if (
            ROOMS.index(there) > ROOMS.index(here)
            or another_method
            or other == "diffkd.methods.base" == module
        ):
            wrong.append(other)
    return wrong


def restricted(node: ast.Call) -> bool:
    """Whether a call says weights_only=True: torch then reads tensors and no code."""
    return any(
        k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
        for k in node.keywords
    )


def unsafe(source: str) -> list[str]:
    """Imports of what the house does without, and calls that unpickle."""
    wrong = [name for name in sorted(imported(source)) if name.split(".")[0] in FORBIDDEN]
    tree = ast.parse(source)
    allowed = {n.func for n in ast.walk(tree) if isinstance(n, ast.Call) and restricted(n)}
    for node in ast.walk(tree):
        if node in allowed:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            wrong += [f"{m}.{a}" for m, a in UNPICKLERS if (node.value.id, node.attr) == (m, a)]
        if isinstance(node, ast.ImportFrom):
            wrong += [
                f"{m}.{a}" for m, a in UNPICKLERS if node.module == m and any(n.name == a for n in node.names)
            ]
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            wrong += [
                f"{node.arg}={node.value.value}"
                for pair in (("allow_pickle", True), ("weights_only", False), ("trust_remote_code", True))
                if (node.arg, node.value.value) == pair
            ]
    return wrong


def test_every_file_has_a_room():
    assert {room(module) for module in MODULES if module != "diffkd"} == set(ROOMS)
    beside = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert beside == {"__init__.py", "errors.py", "py.typed"}


@pytest.mark.parametrize("path", [p for p in FILES if module_of(p) != "diffkd"], ids=module_of)
def test_rooms_run_one_way(path):
    assert backward(path.read_text(encoding="utf-8"), module_of(path)) == []


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {module_of(path): imported(path.read_text(encoding="utf-8")) & MODULES for path in FILES}
    graph["diffkd"] = set()
    done: set[str] = set()
    while len(done) < len(graph):
        free = {module for module, needs in graph.items() if module not in done and needs - {module} <= done}
        assert free, f"in a circle: {sorted(graph.keys() - done)}"
        done |= free


def test_public_names_need_no_import_of_their_own():
    code = (
        "import diffkd; assert callable(diffkd.methods.progressive.target);"
        "assert callable(diffkd.samplers.sample) and not hasattr(diffkd.methods, 'nothing');"
        "assert callable(diffkd.schedules.from_diffusers) and not hasattr(diffkd, 'nothing');"
        "assert callable(diffkd.evaluate) and callable(diffkd.losses.knowledge_distillation);"
        "assert {'load', 'generate', 'evaluate', 'schedules', 'metrics'} <= set(dir(diffkd))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_is_unpickled(path):
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from diffkd.training import trainer", "diffkd.methods.x", ["diffkd.training.trainer"]),
        ("def f():\n    import diffkd.runs", "diffkd.methods.x", ["diffkd.runs"]),
        ("from diffkd.methods import denoising", "diffkd.methods.progressive", ["diffkd.methods.denoising"]),
        ("from diffkd.methods.logits import Logits", "diffkd.methods", ["diffkd.methods.logits"]),
        ("from diffkd.methods.base import Method", "diffkd.methods.progressive", []),
        (
            "from diffkd.io.config import Strict\nfrom diffkd.runs.config import Train",
            "diffkd.metrics.evaluation.records",
            ["diffkd.runs.config"],
        ),
        ("from diffkd.models import loading\nfrom diffkd.errors import UserError", "diffkd.training.x", []),
    ],
)
def test_a_wrong_import_is_seen(source, module, expected):
    assert backward(source, module) == expected


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=flag)",
        "import torch\nread = torch.load",
        "from torch import load",
        "from yaml import load",
        "import yaml\nyaml.load(x, yaml.Loader)",
        "def f():\n    from scipy.linalg import sqrtm",
        "import torchvision.transforms as T",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
def test_unpickling_is_seen(source):
    assert len(unsafe(source)) == 1


def test_what_torch_reads_without_code_is_allowed():
    assert unsafe("import torch\ntorch.load('x', map_location='cpu', weights_only=True)") == []


def test_help_imports_no_torch():
    script = """
import sys
import diffkd, diffkd.cli
for arguments in (["--help"], ["distill", "--help"], ["sample", "--help"], ["evaluate", "--help"]):
    sys.argv = ["diffkd", *arguments]
    try:
        diffkd.cli.main()
    except SystemExit as stop:
        assert not stop.code, stop.code
heavy = [m for m in ("torch", "diffusers", "accelerate", "numpy", "PIL") if m in sys.modules]
print("HEAVY", *heavy)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert "distill" in ran.stdout and "--guidance" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "HEAVY"
