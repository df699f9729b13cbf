"""Pictures of saved students by diffusers alone: from a process that cannot import diffkd."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

STOCK = textwrap.dedent("""
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
