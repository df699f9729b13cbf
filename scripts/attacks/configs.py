"""Odd configs of train, distill and benchmark: values, YAML, encodings, overrides."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from attacks.base import ODD, Attack, Place, damaged, edited, short
from attacks.scene import CONFIGS

COMMAND = {
    "train.yaml": "train",
    "distill.yaml": "distill",
    "classifier.yaml": "distill",
    "bench.yaml": "benchmark",
}
MORE: dict[str, dict[str, Any]] = {  # keys that the scene's configs leave out
    "train.yaml": {
        "seed": 1, "schedule": {"num_train_timesteps": 16, "beta_schedule": "linear",
                                "zero_terminal_snr": True, "beta_start": 1e-4},
        "prediction": "v_prediction", "classes": True,
        "model": {"channels": [8, 16], "norm_groups": 4, "layers": 1, "attention": [False, False],
                  "mid_attention": False,
                  "attention_head_dim": 8, "dropout": 0.1},
        "denoising": {"updates": 1, "warmup": 0, "learning_rate": 1e-3, "gamma": 5, "label_dropout": 0.1},
        "training": {"batch_size": 4, "micro_batches": 2, "ema": 0.9, "betas": [0.9, 0.99],
                     "weight_decay": 0.1, "max_grad_norm": 1.0,
                     "optimizer": "adamw", "ema_device": "cpu",
                     "precision": "bf16", "compile": False, "gradient_checkpointing": True, "log_every": 1,
                     "checkpoint_every": 1,
                     "keep": 1, "max_skipped": 0},
        "data": {"kind": "folder", "path": "images", "size": 8, "channels": 1, "flip": True, "labelled": True,
                 "upscale": True},
    },
    "distill.yaml": {
        "seed": 1, "student": {"kind": "narrow", "ratio": 0.5, "importance": "norm", "weights": "teacher"},
        "method": {"name": "progressive", "steps": [2], "updates": 1, "learning_rate": 1e-3, "warmup": 0,
                   "gamma": 5, "substeps": 2,
                   "guidance": 1, "eta": 0.0, "sampler": "ddim"},
    },
    "classifier.yaml": {"sweep": {"student": "small", "alpha": [0.5], "temperature": [1, 2]}, "seed": 1},
    "bench.yaml": {
        "evaluation": {"samples": 8, "batch_size": 8, "reference": "images.npz",
                       "metrics": ["fid", "kid", "prdc", "is"], "features": "digits",
                       "labels": [0], "sampler": "ddim", "seed": 3, "bootstrap": 2, "precision_k": 3,
                       "density_k": 2},
        "models": [{"path": "plain", "name": "one", "steps": [1], "guidance": 1.0, "stock": False}],
    },
}  # fmt: skip
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(b)}: &{chr(b)} [{', '.join([f'*{chr(b - 1)}'] * 9)}]\n" for b in range(ord("b"), ord("j"))
)
TEXTS: dict[str, str | bytes] = {
    "laughs": LAUGHS, "an alias of itself": "a: &a [*a]\n", "a merge of itself": "a: &a {<<: *a}\n",
    "a merge key": "x: &x {seed: 3}\n<<: *x\n",
    "a merge of a list": "<<: [{seed: 1}, 3]\n", "no such alias": "a: *b\n",
    "seed twice": "seed: 1\nseed: 2\n", "out twice": "out: b\nout: c\n",
    "NUL": "a: \0\n", "an escape": 'a: "\\x1b[31m"\n', "a surrogate": 'out: "\\ud800"\n',
    "NUL in out": 'out: "a\\0b"\n',
    "a tag": "seed: !!python/object/apply:os.system [touch ../outside/exploded]\n",
    "a tuple": "seed: !!python/tuple [1]\n",
    "binary": "seed: !!binary aGVsbG8=\n", "a set": "seed: !!set {a, b}\n",
    "an omap": "data: !!omap [kind: digits]\n", "a date": "seed: 2020-13-45\n",
    "a time": "out: 2020-01-01\n", "sexagesimal": "seed: 190:20:30\n", "octal": "seed: 0o17\n",
    "a long number": "seed: " + "9" * 5000 + "\n",
    "a hex number": "seed: 0x" + "f" * 5000 + "\n", "infinity": "seed: .inf\n", "nan": "seed: .nan\n",
    "a float": "seed: 1e999\n",
    "deep": "a: " + "[" * 10_000 + "]" * 10_000 + "\n",
    "deep maps": "a: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n",
    "deep blocks": "".join(" " * i + "a:\n" for i in range(400)),
    "long": "# " + "x" * (1 << 21) + "\n", "many keys": "".join(f"k{i}: 1\n" for i in range(50_000)),
    "a long key": "k" * 200_000 + ": 1\n",
    "a key of a list": "[1, 2]: 3\n", "a key of a map": "{a: 1}: 3\n", "no": "no: 1\n", "null": "null: 1\n",
    "a tab": "\tseed: 1\n", "two documents": "---\nseed: 1\n",
    "a directive": "%YAML 9.9\n---\n", "a bad tag": "seed: !<tag:x> 1\n", "a key of nothing": ": 1\n",
    "a question": "? seed\n: 1\n", "rlo": "\u202eseed: 1\n",
    "nel": "seed: 1\x85x: 2\n", "invalid UTF-8": b"seed: \xff\n", "overlong": b"seed: \xc0\x80\n",
    "a CR": "seed: 1\rpictures: 0\r", "an anchor": "&a seed: 1\n", "float inf": "training: {ema: .inf}\n",
}  # fmt: skip
OVERRIDES = [
    "", "=", "x", "=x", "seed", "seed=", "seed==1", ".=1", "..=1", "seed.=1", ".seed=1", "seed.x=1", "data=",
    "data=null", "data.kind=", "a" * 5000 + "=1",
    "a." * 3000 + "a=1", "training.betas.0=0.5", "training.betas.-1=0.5", "training.betas.9=0.5",
    "training.betas.x=1", "training.betas.\u0663=1", "models.0=1",
    "seed=\udcff", "seed=[", "seed={", "seed=&a [*a]", "seed=*a", "seed=!!python/name:os.system",
    "seed=" + "9" * 5000, "seed=" + "[" * 2000, "\udcff=1",
    "out=\x00", "seed=1\x1b", "seed='", "token=hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345", "__class__=1",
    "out.__class__=1", "training.__dict__.x=1", "seed=1 # x",
    "seed=---", "seed=1\n2: 3", "-seed=1", "--=1", "-", "--seed=1", "seed=\ufeff1", "method.0.name=x",
    "method.name=progressive", "1=2", "null=1", "<<={seed: 1}",
]  # fmt: skip


def _huge(rng: random.Random) -> dict[str, Any]:
    """Numbers beyond memory, or time."""
    return rng.choice([
        {"training": {"batch_size": 10**12, "micro_batches": 1}},
        {"training": {"batch_size": 10**7, "micro_batches": 10**7}},
        {"model": {"channels": [10**6], "norm_groups": 1}},
        {"model": {"channels": [8, 16], "norm_groups": 4, "layers": 10**6}},
        {"schedule": {"num_train_timesteps": 10**12}},
        {"data": {"kind": "folder", "path": "images", "size": 10**6}},
        {"data": {"kind": "folder", "path": "images", "size": 20_000, "upscale": True}},
        {"evaluation": {"samples": 10**15, "reference": "images.npz"}},
        {"evaluation": {"samples": 16, "batch_size": 10**12, "reference": "images.npz"}},
        {"evaluation": {"samples": 16, "teacher_steps": [10**12], "reference": "images.npz"}},
        {"pictures": 10**15}, {"pictures": 10**6}, {"seed": 2**64}, {"seed": 2**63},
        {"seed": 10**30}, {"evaluation": {"seed": 2**64, "samples": 16, "reference": "images.npz"}},
        {"method": {"name": "progressive", "steps": [2**40], "updates": 1}},
        {"method": {"name": "progressive", "steps": [2], "updates": 1, "substeps": 10**9}},
        {"training": {"keep": 10**30}}, {"training": {"log_every": 10**30, "batch_size": 4}},
        {"training": {"checkpoint_every": 10**400, "batch_size": 4}}, {"denoising": {"updates": 10**400}},
        {"denoising": {"updates": 1, "warmup": 10**400}},
        {"denoising": {"updates": 1, "learning_rate": 1e308}},
        {"denoising": {"updates": 2, "learning_rate": 1e-320}}, {"held_out": 10**30}, {"repeats": 10**12},
        {"labelled": 10**30}, {"evaluation": {"samples": 16, "bootstrap": 10**12, "reference": "images.npz"}},
        {"evaluation": {"labels": [0] * 100_000, "reference": "images.npz"}},
        {"training": {"max_grad_norm": 1e-320}}, {"training": {"weight_decay": 1e308}},
        {"training": {"max_skipped": 10**400}},
    ])  # fmt: skip


def attack(rng: random.Random, number: int, place: Place, scene: Path) -> Attack:
    name = list(COMMAND)[number % len(COMMAND)]
    place.bring(scene, "plain", "images", "images.npz")
    content: dict[str, Any] = {**CONFIGS[name], "out": "runs/new"}
    path = place.here / name
    overrides: list[str] = []
    how = rng.choice(["values", "values", "values", "text", "text", "form", "overrides", "huge", "file"])
    if how == "values":
        for key in rng.sample(list(MORE[name]), rng.randint(1, len(MORE[name]))):
            content[key] = MORE[name][key]
        content, done = edited(rng, content, ODD)
        path.write_text(yaml.safe_dump(content))
    elif how == "huge":
        changes = _huge(rng)
        path.write_text(yaml.safe_dump(content | changes))
        done = short(changes)
    else:
        text = yaml.safe_dump(content).encode()
        if how == "text":
            done = rng.choice(list(TEXTS))
            odd = TEXTS[done]
            odd = odd.encode("utf-8", "surrogatepass") if isinstance(odd, str) else odd
            path.write_bytes(odd + text if rng.random() < 0.5 else text + odd)
        elif how == "form":
            forms = {"UTF-16": text.decode().encode("utf-16"),
                     "UTF-16 without BOM": text.decode().encode("utf-16-le"),
                     "UTF-32": text.decode().encode("utf-32"),
                     "BOM": b"\xef\xbb\xbf" + text, "CRLF": text.replace(b"\n", b"\r\n"),
                     "CR": text.replace(b"\n", b"\r"), "empty": b"", "gzip": b"\x1f\x8b\x08" + text,
                     "JSON": str(content).replace("'", '"').encode()}  # fmt: skip
            done = rng.choice([*forms, "damaged", "damaged"])
            path.write_bytes(forms[done] if done in forms else damaged(rng, text)[0])
        elif how == "overrides":
            path.write_bytes(text)
            overrides = [rng.choice(OVERRIDES).replace("\0", "\\0") for _ in range(rng.choice([1, 1, 2]))]
            done = short(overrides)
        else:
            done = rng.choice(["zero", "folder", "loop", "gone", "sparse", "unreadable"])
            if done == "folder":
                path.mkdir()
            elif done in ("zero", "loop"):
                path.symlink_to("/dev/zero" if done == "zero" else path.name)
            elif done == "sparse":
                with path.open("wb") as stream:
                    stream.truncate(1 << 40)
            elif done == "unreadable":
                path.write_bytes(text)
                path.chmod(0)
    more = [] if COMMAND[name] == "benchmark" else ["--stop-after", "10s"]
    more += rng.choice([[], [], [], ["--dry-run"]])
    return Attack([COMMAND[name], name, *overrides, *more], f"{name}, {how}: {done}")
