"""What the environment around a run may change: the places of its processes, and never its student."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from unittest.mock import Mock

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState

from diffkd.errors import UserError
from diffkd.io import processes
from diffkd.io.processes import Processes
from diffkd.training import launch, surroundings
from diffkd.training.config import Training
from diffkd.training.launch import make_accelerator
from tests.training.stages import run_one, untimed, weights

TRAINING = Training(batch_size=8, log_every=1, checkpoint_every=5)

# Every variable that accelerate reads and REFUSED and OVERRULED have not: what becomes of it. With all those
# that have a value here, a run of one process is compared with one without them.
PLACES = {  # how many processes there are, where, and how they find each other: the launcher's to say
    **dict.fromkeys([
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_RANK",
        "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE", "NCCL_P2P_DISABLE",
        "NCCL_IB_DISABLE", "OMP_NUM_THREADS", "ACCELERATE_CPU_AFFINITY",
        "ACCELERATE_USE_SAGEMAKER", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "FORK_LAUNCHED",
    ]),
    "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "true", "ACCELERATE_DEBUG_MODE": "true",
}  # fmt: skip
SHARDS = dict.fromkeys([  # how they share one network: the same student, by tests/runs/test_parallel.py
    "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION", "FSDP_ACTIVATION_CHECKPOINTING",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "FSDP_AUTO_WRAP_POLICY", "FSDP_BACKWARD_PREFETCH",
    "FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_FORWARD_PREFETCH", "FSDP_MIN_NUM_PARAMS", "FSDP_OFFLOAD_PARAMS",
    "FSDP_RESHARD_AFTER_FORWARD", "FSDP_SHARDING_STRATEGY", "FSDP_STATE_DICT_TYPE", "FSDP_SYNC_MODULE_STATES",
    "FSDP_TRANSFORMER_CLS_TO_WRAP", "FSDP_USE_ORIG_PARAMS", "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "ACCELERATE_CONFIG_DS_FIELDS",
])  # fmt: skip
UNREACHED = {  # read only together with what is refused or overruled, or by parts that a run does not use
    "ACCELERATE_DYNAMO_MODE": "max-autotune", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "true", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true",
    "ACCELERATE_DOWNCAST_BF16": "1", "ACCELERATE_ALLOW_CP_STANDALONE": "true",
    "ACCELERATE_BYPASS_DEVICE_MAP": "true", "ACCELERATE_INIT_INCLUDE_BUFFERS": "true",
    "ACCELERATE_LOG_LEVEL": "ERROR", "ACCELERATE_ENABLE_RICH": "false", "PT_HPU_LAZY_MODE": "1",
    **dict.fromkeys([
        "ACCELERATE_DEBUG_RDV_FILE", "CLEARML_PROJECT", "CLEARML_TASK", "MLFLOW_EXPERIMENT_NAME",
        "MLFLOW_NESTED_RUN", "MLFLOW_RUN_ID", "MLFLOW_TAGS", "NODE_RANK", "NPROC", "PJRT_DEVICE", "TPU_NAME",
        "USE_TORCH_XLA", "systemdrive", "CCL_WORKER_COUNT", "TP_SIZE",
    ]),
}  # fmt: skip
UNREACHED_PREFIXES = ("ACCELERATE_FP8_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")  # of what is refused
KNOWN = {*surroundings.REFUSED, *surroundings.OVERRULED, *PLACES, *SHARDS, *UNREACHED}


@pytest.fixture(autouse=True)
def _as_before():
    """An Accelerator's precision is that of every later one."""
    yield
    AcceleratorState._reset_state()


def is_environ(node):
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def keys(node):
    """The names of variables, as expressions, that a piece of code reads."""
    if isinstance(node, ast.Call) and node.args:
        function, first = node.func, node.args[0]
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        reads = name.endswith("_from_env") or name == "getenv"
        if reads or (name in ("get", "pop", "setdefault") and is_environ(function.value)):
            return first.elts if isinstance(first, ast.List | ast.Tuple) else [first]
    if isinstance(node, ast.Subscript) and is_environ(node.value) and isinstance(node.ctx, ast.Load):
        return [node.slice]
    if isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
        return [node.left]
    return []


def named(key, function):
    """The name that an expression in a function is; None for a variable that its caller gives."""
    constants = {
        target.id: node.value.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if isinstance(key, ast.BinOp):
        return constants[key.left.id] + key.right.value  # prefix + "NAME"
    if isinstance(key, ast.Name):
        return constants.get(key.id)
    assert isinstance(key, ast.Constant), f"a variable's name that this test cannot read: {ast.unparse(key)}"
    return key.value


def read_by_accelerate():
    root = Path(accelerate.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        if path.relative_to(root).parts[0] in ("commands", "test_utils"):  # other programs
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in (tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))):
            nodes = ast.walk(function) if function is not tree else (n for s in tree.body for n in outside(s))
            found |= {named(key, function) for node in nodes for key in keys(node)}
    return found - {None}


def outside(statement):
    """The code of a module that is in no function or class."""
    skip = (ast.FunctionDef, ast.ClassDef)
    return () if isinstance(statement, skip) else ast.walk(statement)


def test_every_variable_that_accelerate_reads_is_known():
    """One that a newer accelerate reads has to be looked at: can it change a student?"""
    found = read_by_accelerate()
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "FSDP_VERSION", "RANK"} <= found
    new = {name for name in found - KNOWN if not name.startswith(UNREACHED_PREFIXES)}
    assert not new, f"put these into a table here, or refuse them in surroundings.py: {sorted(new)}"


@pytest.mark.parametrize("name", surroundings.REFUSED)
def test_what_would_change_the_student_is_refused_by_name(monkeypatch, name):
    surroundings.check({name: "no"})
    monkeypatch.setenv(name, "BF16")
    with pytest.raises(
        UserError, match=rf"variable {name} is 'BF16', which would change the student; unset it"
    ):
        make_accelerator(TRAINING)


SET = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16",
       "ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_GRADIENT_CLIPPING": "0.1"}  # fmt: skip


def test_what_the_config_says_is_not_overruled(tmp_path, monkeypatch, caplog):
    """And neither does anything else here change a bit of what is trained."""
    alone = run_one(tmp_path / "alone", training=TRAINING, accelerator=make_accelerator(TRAINING))
    assert not caplog.records
    values = {name: value for table in (PLACES, UNREACHED) for name, value in table.items() if value}
    fp8 = {f"ACCELERATE_FP8_{name}": "1" for name in ("MARGIN", "INTERVAL", "OVERRIDE_FPROP")}
    for name, value in {**SET, **values, **fp8}.items():
        monkeypatch.setenv(name, value)
    assert SET.keys() == surroundings.OVERRULED.keys()
    amid = run_one(tmp_path / "amid", training=TRAINING, accelerator=make_accelerator(TRAINING))
    assert torch.equal(weights(alone[0]), weights(amid[0])) and untimed(alone[2]) == untimed(amid[2])
    assert [r.getMessage() for r in caplog.records] == [
        f"{name}={SET[name]} has no effect: {setting.remedy} of the run's config decides"
        for name, setting in surroundings.OVERRULED.items()
    ]


def test_what_a_launcher_sets_by_itself_is_not_worth_a_word(monkeypatch, caplog):
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    make_accelerator(TRAINING)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    make_accelerator(TRAINING.model_copy(update={"precision": "bf16"}))
    assert not caplog.records


@pytest.mark.parametrize("device", ["meta", "cuda:77", "toaster"])
def test_a_device_that_is_none(monkeypatch, device):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)
    for use in (Processes, lambda: make_accelerator(TRAINING)):
        with pytest.raises(UserError, match=f"ACCELERATE_TORCH_DEVICE={device} cannot be used .*; unset it"):
            use()


def test_a_place_among_processes_that_is_none(monkeypatch):
    """As LOCAL_RANK that is left over from another command."""
    expected = "environment variable MASTER_ADDR expected, but not set"
    monkeypatch.setattr(processes, "PartialState", Mock(side_effect=ValueError(expected)))
    for use in (Processes, lambda: make_accelerator(TRAINING)):
        with pytest.raises(UserError, match=f"do not fit together .{expected}.; unset RANK, LOCAL_RANK"):
            use()


def test_what_changes_the_last_bits_is_recorded(monkeypatch):
    assert surroundings.rounding({}) == {}
    assert surroundings.rounding({"MKL_CBWR": "AVX2", "HOME": os.sep}) == {"MKL_CBWR": "AVX2"}


def test_fsdp_on_cpus_where_torch_adds_gradients_up(monkeypatch):
    """Only a change of the gradients' norm shows it, and with it how they are clipped."""
    monkeypatch.setattr(launch, "is_torch_version", lambda relation, version: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"FSDP2 is wrong on CPUs before torch 2\.9"):
        launch._apply_on_cpu(Mock())
