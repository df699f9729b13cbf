"""Pictures of saved students by diffusers alone: from processes that cannot import diffkd."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

BARRED = textwrap.dedent("""
    import sys, json
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "diffkd":
                raise ImportError("diffkd is not installed here")
    sys.meta_path.insert(0, Blocked())
    try:
        import diffkd
    except ImportError:
        pass
    else:
        raise SystemExit("diffkd could be imported")
""")
STOCK = BARRED + textwrap.dedent("""
    import numpy as np, torch
    from diffusers import DiffusionPipeline
    students, n, labels, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    for folder, steps, out in students:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        cond = {"class_labels": labels} if labels is not None else {}
        def draw(kind):
            generators = [torch.Generator().manual_seed(5 + i) for i in range(n)]
            options = dict(batch_size=n, generator=generators, num_inference_steps=steps, output_type=kind)
            return pipeline(**options, **cond).images
        pil = draw("pil")
        pictures = np.stack([np.asarray(p).reshape(p.height, p.width, -1) for p in pil])
        names = dict(kind=type(pipeline).__name__, scheduler=type(pipeline.scheduler).__name__)
        np.savez(out, pictures=pictures, floats=draw("np"), **names)
""")
PROMPTED = BARRED + textwrap.dedent("""
    import pathlib
    import diffusers, numpy as np, torch
    jobs, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    for job in jobs:
        pipeline = getattr(diffusers, job["opened"]).from_pretrained(job["folder"])
        pipeline.set_progress_bar_config(disable=True)
        if job["lora"] is not None:
            place = pathlib.Path(job["lora"])
            config = json.loads((place / "scheduler" / "scheduler_config.json").read_text())
            kind = getattr(diffusers, config["_class_name"])
            pipeline.scheduler = kind.from_pretrained(place, subfolder="scheduler")
            pipeline.load_lora_weights(place, **job["named"])
        call = dict(job["call"])
        if job["image"] is not None:
            call["image"] = torch.from_numpy(np.load(job["image"]))
        def draw(kind):
            generator = torch.Generator().manual_seed(job["seed"])
            return pipeline(job["prompt"], generator=generator, output_type=kind, **call).images
        names = dict(kind=type(pipeline).__name__, scheduler=type(pipeline.scheduler).__name__)
        np.savez(job["out"], latents=draw("latent").numpy(), picture=np.asarray(draw("pil")[0]), **names)
""")
LABELLED = BARRED + textwrap.dedent("""
    import pathlib
    import numpy as np, torch
    from diffusers import DiffusionPipeline
    students, n, labels, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    for folder, out in students:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        card = json.loads(pathlib.Path(folder, "diffkd.json").read_text())
        decode, given = pipeline.vae.decode, []
        pipeline.vae.decode = lambda z, *args, **more: (given.append(z), decode(z, *args, **more))[1]
        generators = [torch.Generator().manual_seed(5 + i) for i in range(n)]
        options = dict(class_labels=labels, generator=generators, num_inference_steps=card["steps"])
        pil = pipeline(**options, **card["call"]).images
        latents = given[0] * pipeline.vae.config.scaling_factor
        names = dict(kind=type(pipeline).__name__, scheduler=type(pipeline.scheduler).__name__)
        np.savez(out, pictures=np.stack([np.asarray(p) for p in pil]), latents=latents.numpy(), **names)
""")


@dataclass(frozen=True)
class Prompted:
    """A call of a text-to-image student's pipeline with one prompt.

    opened: the class that opens it. call: its other arguments. image: of image-to-image, (1, 3, H, W) in
    [0, 1]. lora: a folder with an adapter of the pipeline and a scheduler for it. named: how the adapter's
    file is named, where not by the folder alone.
    """

    folder: Path
    prompt: str
    seed: int
    call: Mapping[str, Any]
    opened: str = "DiffusionPipeline"
    image: torch.Tensor | None = None
    lora: Path | None = None
    named: Mapping[str, str] = field(default_factory=dict)


def stock_pictures_of_prompts(asked: Sequence[Prompted], place: Path) -> list[Any]:
    """Of each of these calls the `latents`, the `picture` in uint8 (H, W, 3), and the names of the pipeline
    (`kind`) and of its `scheduler`. place: a folder to work in."""
    jobs = []
    for number, one in enumerate(asked):
        image = None if one.image is None else str(place / f"image-{number}.npy")
        if image is not None and one.image is not None:
            np.save(image, one.image.numpy())
        out = str(place / f"prompted-{number}.npz")
        more = {"folder": str(one.folder), "call": dict(one.call), "image": image, "out": out}
        more |= {"lora": None if one.lora is None else str(one.lora), "named": dict(one.named)}
        jobs.append({**vars(one), **more})
    argument = json.dumps([jobs, torch.get_num_threads()])
    done = subprocess.run(
        [sys.executable, "-c", PROMPTED, argument], capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 0, done.stderr
    return [np.load(job["out"]) for job in jobs]


def stock_pictures(
    students: Sequence[tuple[Path, int]], place: Path, n: int, labels: Sequence[int] | None
) -> list[Any]:
    """Of each of these students, in so many steps, n images from the seeds 5, 6, ...: `pictures` in uint8,
    `floats`, and the names of the pipeline (`kind`) and of its `scheduler`. place: a folder to work in."""
    outs = [place / f"stock-{number}.npz" for number in range(len(students))]
    jobs = [(str(folder), steps, str(out)) for (folder, steps), out in zip(students, outs, strict=True)]
    argument = json.dumps([jobs, n, None if labels is None else list(labels), torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-c", STOCK, argument], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    return [np.load(out) for out in outs]


def stock_pictures_of_labels(folders: Sequence[Path], place: Path, labels: Sequence[int]) -> list[Any]:
    """Of each of these latent students, called as its card says, an image of each label from the seeds 5, 6,
    ...: `latents` (N, C, H, W), `pictures` in uint8 (N, H, W, 3), and the names of the pipeline (`kind`) and
    of its `scheduler`. place: a folder to work in."""
    outs = [place / f"labelled-{number}.npz" for number in range(len(folders))]
    jobs = [(str(folder), str(out)) for folder, out in zip(folders, outs, strict=True)]
    argument = json.dumps([jobs, len(labels), list(labels), torch.get_num_threads()])
    done = subprocess.run(
        [sys.executable, "-c", LABELLED, argument], capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 0, done.stderr
    return [np.load(out) for out in outs]


def assert_sampled(cli: Any, out: Path, expected: Any, *arguments: Any) -> None:
    """That `diffkd sample` with these arguments writes these uint8 images, to a shade. out: an archive."""
    outcome = cli("sample", *arguments, "--out", out)
    assert (outcome.code, outcome.stderr) == (0, "")
    with np.load(out) as content:
        pictures = content["arr_0"].astype(int)
    assert pictures.std() > 5 and np.abs(pictures - expected).max() <= 1
