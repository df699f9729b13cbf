"""Broken pipelines, for sample, evaluate, distill and benchmark."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.base import Attack, Place, damaged, edited, odd_json, short

INDEX, NETWORK, SCHEDULER, CARD = (
    "model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "diffkd.json",
)  # fmt: skip
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PIPELINES = (
    "plain",
    "labelled",
    "linear",
    "colour",
    "runs/students/students/2-steps",
    "runs/teacher/teacher",
)
Harm = Callable[[random.Random, Path], str]


class Canary:
    """Leaves a file beside the pipeline when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def canaries(rng: random.Random, folder: Path, exploded: Path) -> None:
    """Pickles and code wherever a loader might look for weights or classes."""
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "x.ckpt", "x.pkl"):
        for where in (folder, folder / "unet", folder / "scheduler"):
            (where / name).write_bytes(pickle.dumps(Canary(exploded)))
    code = f"from pathlib import Path\nPath({str(exploded)!r}).touch()\nclass Mine: ...\n"
    names = ["pipeline.py", "unet/my.py", "unet/unet.py", "my.py", "modeling.py"]
    for name in [*names, *(["unet/diffusers.py"] if rng.random() < 0.2 else [])]:
        (folder / name).write_text(code)


def _load(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else {}


def values(rng: random.Random, folder: Path) -> str:
    name = rng.choice([INDEX, NETWORK, NETWORK, NETWORK, SCHEDULER, SCHEDULER, CARD])
    content, done = edited(rng, _load(folder / name) or {"steps": 2})
    (folder / name).write_text(json.dumps(content))
    return f"{name}: {done}"


def form(rng: random.Random, folder: Path) -> str:
    name = rng.choice([INDEX, NETWORK, SCHEDULER, CARD])
    text, done = odd_json(rng, _load(folder / name))
    (folder / name).write_bytes(text)
    return f"{name}: {done}"


NETWORK_VALUES: dict[str, list[Any]] = {
    "sample_size": [7, 1, 0, 9, [8, 16], [16, 8], [8], [8, 8, 8], 10**9, "8", 8.0, None, -8, 64],
    "in_channels": [3, 2, 0, None, 1.0], "out_channels": [2, 3, 6, 0],
    "block_out_channels": [[8], [8, 16, 16], [16, 8], [0, 0], [8.0, 16.0], [12, 20], 8],
    "down_block_types": [["DownBlock2D"], ["AttnDownBlock2D", "DownBlock2D"], ["CrossAttnDownBlock2D"] * 2,
                         ["SkipDownBlock2D"] * 2, ["os.system"] * 2, ["KDownBlock2D"] * 2, "DownBlock2D"],
    "up_block_types": [["UpBlock2D"], ["AttnUpBlock2D", "UpBlock2D"], ["CrossAttnUpBlock2D"] * 2, [3, 4]],
    "mid_block_type": [None, "UNetMidBlock2DCrossAttn", "x"],
    "num_class_embeds": [1, 10, 11, 0, -1, 10**7, "10", None, 2.5, True],
    "class_embed_type": ["timestep", "identity", "x", None, "projection"],
    "time_embedding_type": ["fourier", "learned", "x", None], "freq_shift": [1, -160, 160, 10**5, None, "x"],
    "norm_num_groups": [1, 3, 5, 0, 8, -4, None, 4.0], "norm_eps": [0, -1, 1e30, "x"],
    "act_fn": ["relu", "x", "mish", 3], "center_input_sample": [True, "x"], "flip_sin_to_cos": [False, "x"],
    "attention_head_dim": [1, 0, -1, 3, 10**6, None], "layers_per_block": [2, 0, -1, 10**6, [1, 2], 1.5],
    "dropout": [1.0, 2, -1, float("nan"), "x"], "downsample_padding": [0, 3, -1],
    "mid_block_scale_factor": [0, 1e30],
    "resnet_time_scale_shift": ["scale_shift", "spatial", "x"], "attn_norm_num_groups": [3, 0, 4],
    "num_train_timesteps": [1000, 0, 10**9, "x"], "downsample_type": ["resnet", "x"],
    "add_attention": [True, "x"],
    "_class_name": ["UNet2DConditionModel", "DiTTransformer2DModel", "x", None, 3, ["UNet2DModel"]],
    "_diffusers_version": ["99.0", None, 3], "quantization_config": [{"quant_method": "x"}, 3, {}],
}  # fmt: skip
SCHEDULER_VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [1, 2, 3, 0, -1, 10**5, 10**6, 10**12, 1000.0, "1000", None, True],
    "beta_start": [0, -1, 1, 2, float("nan"), float("inf"), 1e-300, "x", None, 0.03],
    "beta_end": [0, -1, 1, 2, float("nan"), 1e300, "x"], "beta_schedule": ["x", "sigmoid", "scaled_linear",
        None, 3],
    "trained_betas": [[0.1] * 1024, [], [2], [float("nan")] * 1024, "x", [[0.1]], [0] * 1024, [1] * 1024,
                      [0.1]],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction", "x", None, 3, ["epsilon"]],
    "rescale_betas_zero_snr": [True, False, "x", None], "clip_sample": [True, False, "x", None],
    "clip_sample_range": [0, -1, 1e-30, float("nan"), float("inf"), "x", 5, None],
    "thresholding": [True, "x"],
    "dynamic_thresholding_ratio": [0, 2, -1, "x"], "sample_max_value": [0, -1, 100],
    "timestep_spacing": ["leading", "linspace", "trailing", "x", None],
    "steps_offset": [1, -1, 10**6, "x", None],
    "set_alpha_to_one": [False, True, "x"], "variance_type": ["learned", "learned_range", "fixed_large", "x",
        None],
    "_class_name": ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler",
                    "FlowMatchEulerDiscreteScheduler",
                    "CMStochasticIterativeScheduler", "UnCLIPScheduler", "DDPMWuerstchenScheduler", "x", None,
                    3],
    "sigma_min": [0, 1], "shift": [3.0, float("nan")],
}  # fmt: skip
CARD_VALUES: dict[str, list[Any]] = {
    "steps": [1, 3, 5, 1000, 1 << 20, 10**6, 0, -1, "4", None, 4.0, [4], True],
    "num_classes": [1, 10, 11, 9, 10**6, None, "10"], "null_label": [0, 9, 10, 11, 10**6, None, "x"],
    "num_train_timesteps": [1, 1000, 1024, 10**5, 10**6, 0], "clip": [0, -1, float("nan"), 1e30, None, "x",
        [1]],
    "prediction": ["epsilon", "x", None, 3], "sampler": ["renoise", "ddim", "heun", "x", None, 3, ["ddim"]],
    "guidance": [2.0, float("nan"), -1, "x", None, [1], 1e308],
    "class_counts": [[1], [0] * 10, [-1, 2], "x", [10**30], [0.5]],
    "metrics": [[{}], {}, "x", [{"steps": "x"}], [[]], [{"fid": float("nan"), "protocol": 3}]],
    "method": ["x", None, 3, {"name": "x"}], "parameters": ["x", -1, 10**40],
    "teacher": [3, None, {"path": 3}, "\ud800"],
    "classes": [["a"], [3], "x", ["\x1b[31m"] * 10], "eta": [2, -1, "x"], "schema": [99, "x"], "version": [3],
}  # fmt: skip


def fields(rng: random.Random, folder: Path) -> str:
    name, table = rng.choice([(NETWORK, NETWORK_VALUES), (SCHEDULER, SCHEDULER_VALUES), (CARD, CARD_VALUES)])
    content, done = _load(folder / name), []
    for key in rng.sample(list(table), rng.choice([1, 1, 1, 2])):
        content[key] = rng.choice(table[key])
        done.append(f"{key} = {short(content[key])}")
    (folder / name).write_text(json.dumps(content))
    return f"{name}: {', '.join(done)}"


def rebuilt(rng: random.Random, folder: Path) -> str:
    """Another network, whole in itself, in the place of the right one."""
    import diffusers
    import torch

    warnings.simplefilter("ignore")
    config = {k: v for k, v in _load(folder / NETWORK).items() if not k.startswith("_")}
    keys = [k for k in NETWORK_VALUES if not k.startswith("_") and k != "quantization_config"]
    for _ in range(20):
        changes = {key: rng.choice(NETWORK_VALUES[key]) for key in rng.sample(keys, rng.choice([1, 2, 3]))}
        if 10**6 in changes.values():
            continue  # layers: it would take minutes
        try:
            with torch.device("meta"):
                network = diffusers.UNet2DModel.from_config({**config, **changes})
            if sum(p.numel() for p in network.parameters()) > 200_000:
                continue
            diffusers.UNet2DModel.from_config({**config, **changes}).save_pretrained(folder / "unet")
        except Exception:  # not a network that diffusers can build
            continue
        return f"a network with {changes}"
    return "nothing"


def tensors(rng: random.Random, folder: Path) -> str:
    """Safetensors that are whole, of other tensors than the config says."""
    import torch
    from safetensors.torch import load_file, save_file

    content = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(content))
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.uint8,
             torch.float8_e4m3fn]  # fmt: skip
    kind = rng.choice(kinds)
    one = content[name]
    changes: dict[str, Callable[[], dict[str, Any]]] = {
        f"{name} as {kind}": lambda: {**content, name: one.to(kind)},
        f"all as {kind}": lambda: {key: value.to(kind) for key, value in content.items()},
        f"half as {kind}": lambda: {k: v.to(kind) if i % 2 else v for i,
                                    (k, v) in enumerate(content.items())},
        f"without {name}": lambda: {k: v for k, v in content.items() if k != name},
        f"{name} renamed": lambda: {("x." + k if k == name else k): v for k, v in content.items()},
        "all renamed": lambda: {"module." + k: v for k, v in content.items()},
        "one more": lambda: {**content, "more": torch.zeros(3)},
        f"{name} shorter": lambda: {**content, name: one[:-1]},
        f"{name} empty": lambda: {**content, name: one[:0]},
        f"{name} flat": lambda: {**content, name: one.flatten()[None]},
        f"{name} transposed": lambda: {**content, name: one.transpose(0, -1)},
        f"{name} a number": lambda: {**content, name: torch.tensor(1.0)},
        f"{name} NaN": lambda: {**content, name: one * float("nan")},
        f"{name} infinite": lambda: {**content, name: one + float("inf")},
        "one value NaN": lambda: {**content, name: one.flatten().index_fill(0, torch.tensor([0]),
            float("nan")).view_as(one)},
        "huge": lambda: {k: v * 1e30 for k, v in content.items()},
        "zero": lambda: {k: v * 0 for k, v in content.items()},
        "no tensors": dict, "odd names": lambda: {**content, "\x1b[31m": one[:1], "a\nb": one[:1]},
    }  # fmt: skip
    how = rng.choice(list(changes))
    save_file(
        {k: v.contiguous().clone() for k, v in changes[how]().items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    return how


def header(rng: random.Random, folder: Path) -> str:
    """Safetensors with a header that lies."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([key for key in head if key != "__metadata__"])
    how = rng.choice(["offsets", "shape", "dtype", "length", "metadata", "deep", "twice", "sparse"])
    if how == "length":
        new = (
            struct.pack("<Q", rng.choice([0, 1, 2**63, 2**64 - 1, length + 1, len(data) * 2, 10**8]))
            + data[8:]
        )
    elif how == "sparse":
        with (folder / WEIGHTS).open("r+b") as stream:
            stream.truncate(1 << 36)
        return "64 GiB of nothing behind the weights"
    else:
        if how == "offsets":
            head[name]["data_offsets"] = rng.choice(
                [[0, 0], [5, 1], [-1, 4], [0, 10**18], [0], "x", [0.5, 2], [1, 5]]
            )
        elif how == "shape":
            head[name]["shape"] = rng.choice([[10**9, 10**9], [-1], [0], "x", [2**63], [], [1] * 1000, [0.5]])
        elif how == "dtype":
            head[name]["dtype"] = rng.choice(["F16", "I64", "x", "F8_E4M3", "C64", 3, None, "F4"])
        elif how == "metadata":
            head["__metadata__"] = rng.choice(
                [{"format": "tf"}, {"format": "flax"}, {}, {"format": 3}, [], {"x": "y" * 10**6}]
            )
        text = json.dumps(head).encode()
        if how == "deep":
            text = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
        elif how == "twice":
            text = text[:-1] + b", " + text[1:]
        new = struct.pack("<Q", len(text)) + text + body
    (folder / WEIGHTS).write_bytes(new)
    return f"weights with a header whose {how} lies"


def torn(rng: random.Random, folder: Path) -> str:
    data, done = damaged(rng, (folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(data)
    return f"weights {done}"


def shards(rng: random.Random, folder: Path) -> str:
    """Weights in two files and an index, mostly with something wrong."""
    from safetensors.torch import load_file, save_file

    content = load_file(folder / WEIGHTS)
    names, unet = sorted(content), folder / "unet"
    stem = "diffusion_pytorch_model-0000{}-of-00002.safetensors"
    files = {name: stem.format(1 + i % 2) for i, name in enumerate(names)}
    for number in (1, 2):
        part = {k: content[k] for k in names if files[k] == stem.format(number)}
        save_file(part, unet / stem.format(number), metadata={"format": "pt"})
    if rng.random() < 0.9:
        (folder / WEIGHTS).unlink()
    index: Any = {"metadata": {"total_size": 1}, "weight_map": files}
    how = rng.choice(
        [
            "whole",
            "a shard missing",
            "a key missing",
            "names",
            "map",
            "form",
            "torn",
            "swapped",
            "variant",
            "link",
        ]
    )
    if how == "a shard missing":
        (unet / stem.format(2)).unlink()
    elif how == "a key missing":
        del files[names[0]]
    elif how == "names":
        odd = ["../outside", "/etc/passwd", "x.bin", "", 3, None, "\0.safetensors",
               "e" * 300 + ".safetensors",
               "..safetensors", "../unet/" + stem.format(1)]  # fmt: skip
        files[names[0]] = rng.choice(odd)
        how += f" {short(files[names[0]])}"
    elif how == "map":
        index["weight_map"] = rng.choice([[], {}, None, "x", 3, {"x": "y"}, {"x": []}])
    elif how == "torn":
        path = unet / stem.format(1)
        path.write_bytes(damaged(rng, path.read_bytes())[0])
    elif how == "swapped":
        index["weight_map"] = {k: stem.format(3 - int(v[25])) for k, v in files.items()}
    elif how == "link":
        (unet / stem.format(1)).unlink()
        (unet / stem.format(1)).symlink_to(
            rng.choice([stem.format(1), "../../gone", "../../../outside/precious"])
        )
    text = json.dumps(index).encode()
    if how == "form":
        text, done = odd_json(rng, index)
        how += f" {done}"
    suffix = ".fp16" if how == "variant" else ""
    (unet / f"diffusion_pytorch_model.safetensors.index{suffix}.json").write_bytes(text)
    return f"shards: {how}"


def files(rng: random.Random, folder: Path) -> str:
    """A file that is missing, elsewhere, or no file."""
    name = rng.choice([INDEX, NETWORK, SCHEDULER, WEIGHTS, WEIGHTS, CARD, "unet", "scheduler"])
    path, outside = folder / name, _here(folder).parent / "outside"
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    how = rng.choice(
        ["gone", "folder", "loop", "dangling", "outside", "zero", "full", "fifo", "bin", "fp16", "other"]
    )
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "dangling":
        path.symlink_to("../gone")
    elif how == "outside":
        path.symlink_to(outside / "precious")
    elif how == "zero":
        path.symlink_to("/dev/zero")
    elif how == "full":
        path.symlink_to("/dev/full")
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "bin":
        path.with_name("diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))
    elif how == "fp16":
        path.with_name("diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    elif how == "other":
        path.with_name("other.safetensors").write_bytes(b"\0" * 50)
    return f"{name}: {how}"


def _here(folder: Path) -> Path:
    """The working directory of the attack, in which the pipeline lies."""
    return next(parent for parent in folder.parents if parent.name == "here")


def classes(rng: random.Random, folder: Path) -> str:
    """Components of classes that must not be opened, or that do not belong here."""
    content = _load(folder / INDEX)
    how = rng.choice(["unet", "scheduler", "pipeline", "more"])
    entry = rng.choice([
        ["my", "Mine"], ["unet", "Mine"], ["os", "system"], ["transformers", "AutoModel"], ["diffusers", "x"],
        ["my"], [3],
        ["diffusers", "UNet2DConditionModel"], ["diffusers", "AutoencoderKL"],
        ["diffusers", "DiTTransformer2DModel"],
        ["diffusers", "FlaxUNet2DConditionModel"], ["diffusers", "DDPMScheduler"],
        ["diffusers", "UNet2DModel"], None,
        [None, None], "x", ["diffusers", ["UNet2DModel"]], ["diffusers.models", "UNet2DModel"], [], {"a": 1},
    ])  # fmt: skip
    if how == "pipeline":
        content["_class_name"] = entry = rng.choice([
            "StableDiffusionPipeline", "DiTPipeline", "ScoreSdeVePipeline", "PNDMPipeline",
            ["pipeline", "Mine"], "my",
            "DiffusionPipeline", "UNet2DModel", None, 3, "\ud800", "DDPMPipeline", "DDIMPipeline",
            "KarrasVePipeline",
            "ConsistencyModelPipeline", "LDMPipeline", "FlaxDiffusionPipeline", "__doc__", "models", "",
        ])  # fmt: skip
    else:
        content[rng.choice(["vae", "text_encoder", "../x", "\0", ""]) if how == "more" else how] = entry
    (folder / INDEX).write_text(json.dumps(content))
    return f"model_index.json: {how} is {short(entry)}"


HARMS: list[Harm] = [values, values, form, fields, fields, fields, rebuilt, rebuilt, tensors, tensors, header,
                     torn,
                     shards, files, classes]  # fmt: skip


def _command(rng: random.Random, number: int, name: str) -> list[str]:
    """sample, evaluate or distill in turn, and benchmark now and then."""
    if number % 20 == 19:
        return ["benchmark", "bench.yaml", f"models.0.path={name}", "out=runs/new",
                *rng.choice([[], ["models.0.stock=true"], ["models.0.steps=[]"]])]  # fmt: skip
    if number % 3 == 0:
        more = rng.choice([
            ["--steps", "1"], ["--steps", "2", "--sampler", "heun"],
            ["--steps", "2", "--sampler", "dpmpp_2m"], [],
            ["--steps", "2", "--sampler", "ancestral", "--eta", "0.5"], ["--steps", "1", "-w", "2"],
            ["--steps", "1", "--dtype", "bfloat16"], ["--steps", "2", "--classes", "0-9"],
            ["--steps", "1", "--sampler", "renoise"], ["--steps", "1", "--classes", "data"],
        ])  # fmt: skip
        return ["sample", name, "--out", rng.choice(["new", "new.npz"]), "-n", "2", *more]
    if number % 3 == 1:
        more = rng.choice([
            ["--steps", "1"], ["--steps", "1,2", "--sampler", "stock"], [],
            ["--steps", "1", "--guidance", "2"],
            ["--steps", "1", "--metrics", "fid,agreement", "--teacher", name, "--teacher-steps", "1"],
            ["--steps", "1", "--null-label", "9"], ["--steps", "1", "--metrics", "agreement", "--teacher",
                "right"],
        ])  # fmt: skip
        return [
            "evaluate",
            name,
            "--reference",
            "ref.npz",
            "--samples",
            "4",
            "--batch-size",
            "4",
            "--out",
            "new.json",
            *more,
        ]
    more = rng.choice([
        [], ["method.sampler=ancestral"], ["method={name: output, updates: 1}"],
        ["method={name: denoising, updates: 1}"], ["method={name: feature, updates: 1}"],
        ["student={kind: narrow, ratio: 0.5}"], ["student={kind: drop_blocks, blocks: [mid_block]}"],
        ["pictures=2"], ["data={kind: folder, path: images, size: 8, channels: 1}"],
        ["training.precision=bf16"],
    ])  # fmt: skip
    short_run = ["method.updates=1", "evaluation=null", "pictures=0"]
    given = [
        f"teacher.path={name}",
        "out=runs/new",
        *(s for s in short_run if not any(m.startswith(s[:6]) for m in more)),
    ]
    colour = ["data={kind: folder, path: images, size: 8, channels: 3}"] if name == "colour" else []
    return ["distill", "distill.yaml", *given, *more, *colour, "--stop-after", "20s"]


def attack(rng: random.Random, number: int, place: Place, scene: Path) -> Attack:
    base = rng.choice(PIPELINES)
    place.bring(scene, base, "distill.yaml", "bench.yaml", "ref.npz", "images.npz", "images")
    folder = place.here / base
    if base != "plain":
        shutil.copytree(scene / "plain", place.here / "right")
    else:
        shutil.copytree(folder, place.here / "right")
    if rng.random() < 0.3:
        canaries(rng, folder, place.outside / "exploded")
    done = [base]
    for harm in rng.sample(HARMS, rng.choice([1, 1, 1, 2])):
        if os.path.lexists(folder / WEIGHTS) and not (folder / WEIGHTS).is_file():
            break  # a pipe or a device by now, which would never end
        try:
            done.append(harm(rng, folder))
        except Exception as error:  # after another harm there is nothing left to harm
            if len(done) == 1:
                raise
            done.append(f"nothing more ({type(error).__name__})")
    return Attack(_command(rng, number, base), "; ".join(done))
