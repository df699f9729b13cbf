"""How a model is drawn with, as its card shows it: code that runs as it stands, once its place is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffkd.core.denoiser import GUIDANCE, USUAL_GUIDANCE
from diffkd.models.installed import dtype_argument
from diffkd.models.masked_prompts import MASK

PLACE = '"path/to/this/folder"'  # where a repository of the Hub does as well
FILES = 'folder = "path/to/these/files"'  # where it does not, and has to be downloaded
PROMPT = '"what to draw"'
DTYPES = ("float16", "bfloat16")


def lines(card: Mapping[str, Any], title: str, count: int) -> list[str]:
    """card: the content of diffkd.json, which may come from anywhere. title: what it is. count: of steps."""
    export, lora = card.get("export", {}), card.get("lora", {})
    kind = export.get("kind")
    if kind in ("onnx", "torch-export"):
        return _program(card, title, count)
    if kind == "single-file":
        return _single_file(card, title, count)
    if "scheduler" in lora:
        return _adapter(card, title, count)
    if card.get("stock") is False:
        return _of_diffkd_alone(title, card.get("num_classes"), count)
    return _pipeline(card, title, count)


def code(*written: str) -> list[str]:
    return ["```python", *written, "```", ""]


def arguments(card: Mapping[str, Any], count: int) -> str:
    """Of the call of a stock pipeline."""
    classes = card.get("num_classes")
    call = {} if card.get("prompts") else {"batch_size": 16}  # a pipeline of another call says it
    given = [f"{key}={value!r}" for key, value in card.get("call", call).items()]
    if classes:
        given.append(f"class_labels=[i % {classes} for i in range(16)]")
    return ", ".join([*[PROMPT] * bool(card.get("prompts")), *given, f"num_inference_steps={count}"])


def _absent(card: Mapping[str, Any]) -> str:
    """Arguments for components that the folder does not have."""
    return "".join(f", {component}=None" for component in card.get("absent", []))


def _name(given: Any, default: str) -> str:
    """The name of a class that a card says."""
    return given if isinstance(given, str) and given.isidentifier() else default


def _pipeline(card: Mapping[str, Any], title: str, count: int) -> list[str]:
    """A stock pipeline's own folder."""
    export = card.get("export", {})
    dtype = export.get("dtype") if export.get("dtype") in DTYPES else None
    variant = ', variant="fp16"' * (export.get("kind") == "fp16")
    how = "" if dtype is None else f"{variant}, {dtype_argument()}=torch.{dtype}"
    what = {
        "fp16": " in half precision",
        "int8": " with the weights of linear layers in 8 bits, which needs torchao beside diffusers",
    }.get(str(export.get("kind")), "")
    return [
        f"{title} made by diffkd, a stock diffusers pipeline{what}:",
        "",
        *code(
            *["import torch"] * (dtype is not None),
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({PLACE}{how}{_absent(card)})",
            f"images = pipeline({arguments(card, count)}).images",
        ),
    ]


def _adapter(card: Mapping[str, Any], title: str, count: int) -> list[str]:
    """A LoRA, drawn by the stock pipeline of its base."""
    lora, export = card["lora"], card.get("export", {})
    if export.get("comfy_alone"):
        return _for_comfy(card, title)
    scheduler = _name(lora["scheduler"], "DDIMScheduler")
    kohya = export.get("kind") == "kohya"
    named = ', weight_name="kohya_lora_weights.safetensors"' * kohya
    remarks = [
        "The scheduler is part of it: with the base's own it draws other images."
        + " `diffkd fuse` makes a whole pipeline of the two." * (not kohya)
    ]
    if kohya:
        remarks[0] += (
            " ComfyUI and A1111 load the .safetensors as a LoRA, in as many steps, without guidance (CFG 1)."
        )
    return [
        f"{title} made by diffkd, an adapter (LoRA) of rank {lora['rank']} for a stock diffusers pipeline:",
        "",
        *code(
            f"from diffusers import DiffusionPipeline, {scheduler}",
            "",
            f"folder = {PLACE}",
            f"pipeline = DiffusionPipeline.from_pretrained({str(lora['base'])!r}{_absent(card)})",
            f'pipeline.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")',
            f"pipeline.load_lora_weights(folder{named})",
            f"images = pipeline({arguments(card, count)}).images",
        ),
        *remarks,
        "",
    ]


def _for_comfy(card: Mapping[str, Any], title: str) -> list[str]:
    """A LoRA that stock diffusers would read as nothing, or as a part of what it is."""
    lora, weight = card["lora"], card.get("call", {}).get("guidance_scale", 1.0)
    given = "" if weight == 1 else f", its guidance input at {weight:g}"
    return [
        f"{title} made by diffkd, an adapter (LoRA) of rank {lora['rank']} for ComfyUI.",
        "",
        f"ComfyUI loads the .safetensors as a LoRA of `{lora['base']}`, in as many steps, without guidance "
        f"by a second pass (CFG 1){given}. The scheduler is part of it: with the base's own it draws other "
        "images.",
        "",
        "Stock diffusers does not read these keys: for it there is `diffkd export STUDENT --to lora`.",
        "",
    ]


def _single_file(card: Mapping[str, Any], title: str, count: int) -> list[str]:
    kind, absent = _name(card["export"].get("class"), "DiffusionPipeline"), _absent(card)
    if kind.endswith("Pipeline"):
        told = f"{title} made by diffkd, one file in the original layout, which ComfyUI and A1111 read too:"
        opened = [
            f"from diffusers import {kind}",
            "",
            FILES,
            f'pipeline = {kind}.from_single_file(f"{{folder}}/model.safetensors", config=folder)',
        ]
    else:
        scheduler = _name(card["export"].get("scheduler"), "FlowMatchEulerDiscreteScheduler")
        base = card.get("base_model") or card.get("teacher") or "path/to/its/teacher"
        told = f"{title} made by diffkd, its network in one file; all else is its teacher's:"
        opened = [
            f"from diffusers import DiffusionPipeline, {kind}, {scheduler}",
            "",
            FILES,
            f"network = {kind}.from_single_file(",
            '    f"{folder}/transformer.safetensors", config=folder, subfolder="transformer"',
            ")",
            f"pipeline = DiffusionPipeline.from_pretrained({str(base)!r}, transformer=network{absent})",
            f'pipeline.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")',
        ]
    return [told, "", *code(*opened, f"images = pipeline({arguments(card, count)}).images")]


def _program(card: Mapping[str, Any], title: str, count: int) -> list[str]:
    """A network alone, and the loop of its steps around it."""
    export = card["export"]
    onnx, inputs, dtypes = export["kind"] == "onnx", export["inputs"], export["dtypes"]
    scheduler = _name(export.get("scheduler"), "DDIMScheduler")
    sample, _, *cond = inputs
    shape = ", ".join(map(str, inputs[sample][1:]))
    steps = f"sigmas=[1 - i / {count} for i in range({count})]" if export.get("handed") else str(count)
    scaled = "x" if scheduler.startswith("Flow") else "scheduler.scale_model_input(x, t)"
    first = f"torch.randn(4, {shape})" + " * scheduler.init_noise_sigma" * (not scheduler.startswith("Flow"))
    opened = [
        'session = onnxruntime.InferenceSession(f"{folder}/network.onnx")',
        "",
        "",
        "def network(sample, timestep, cond):",
        '    given = {"sample": sample, "timestep": timestep, **cond}',
        '    found = session.run(["output"], {key: value.numpy() for key, value in given.items()})',
        "    return torch.from_numpy(found[0])",
        "",
        "",
    ] if onnx else ['network = torch.export.load(f"{folder}/network.pt2").module()']  # fmt: skip
    given = [f'    "{key}": {_example(key, inputs[key], dtypes[key], export)},' for key in cond]
    padded = "; the mask is 0 at padding" * (MASK in cond)
    told = ", cond=cond" * (onnx or bool(cond))
    return [
        f"{title} made by diffkd: its network as a program for {'ONNX Runtime' if onnx else 'torch'}, for "
        f"up to {export.get('most')} images at once. Its steps are those of its scheduler, here of "
        "diffusers:",
        "",
        *code(
            *["import onnxruntime"] * onnx,
            "import torch",
            f"from diffusers import {scheduler}",
            "",
            FILES,
            *opened,
            f'scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")',
            f"scheduler.set_timesteps({steps})",
            f"x = {first}",
            *([f"cond = {{  # what it is to draw, in place of these{padded}", *given, "}"] if cond else []),
            *["cond = {}"] * (onnx and not cond),
            "for t in scheduler.timesteps:",
            f"    output = network(sample={scaled}, timestep=t.float().expand(4){told})",
            "    x = scheduler.step(output, t, x).prev_sample",
        ),
        "| input | shape | |",
        "|---|---|---|",
        *(f"| `{key}` | {', '.join(map(str, shape))} | {dtypes[key]} |" for key, shape in inputs.items()),
        "",
    ]


def _example(key: str, shape: list[Any], dtype: str, export: Mapping[str, Any]) -> str:
    """Of an input that says what is drawn, for four images: zeros, a prompt without padding, or the usual
    weight of guidance."""
    size, dtype = ", ".join(map(str, [4, *shape[1:]])), f"dtype=torch.{dtype}"
    if key == GUIDANCE:
        return f"torch.full(({size},), {float(export.get('guidance', USUAL_GUIDANCE)):g}, {dtype})"
    return f"torch.{'ones' if key == MASK else 'zeros'}({size}, {dtype})"


def _of_diffkd_alone(title: str, classes: Any, count: int) -> list[str]:
    """How a network is drawn that no class of diffusers is."""
    labels = f", labels=[i % {classes} for i in range(16)]" if classes else ""
    return [
        f"{title} made by diffkd. Its network is of no class of diffusers, so diffkd draws it, and diffusers "
        "alone does not:",
        "",
        *code(
            "import diffkd",
            "",
            f"model = diffkd.load({PLACE})",
            f"(images,) = diffkd.generate(model, 16, steps={count}, seed=0{labels})  # uint8 (16, H, W, C)",
        ),
    ]
