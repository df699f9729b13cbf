"""Converts a network of NVlabs' EDM from its pickle to safetensors that diffkd opens as a teacher.

python scripts/convert_edm.py edm-imagenet-64x64-cond-adm.pkl models/edm-imagenet64

No code of the pickle is run: of what it names, tensors are rebuilt, and all else becomes a record of its
state. Read so far, inside EDMPrecond: DhariwalUNet, which is ADM (ImageNet), as a stock pipeline; SongUNet,
which is DDPM++ or NCSN++ (the VP and VE networks of CIFAR-10, FFHQ and AFHQv2), as a network that diffkd
alone opens.
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler, UNet2DModel
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import adm
from diffkd.models.song_unet import SongUNet

# arguments of EDMPrecond, and of every network in it
COMMON = frozenset((
    "img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data",
    "model_type", "in_channels", "out_channels", "augment_dim", "model_channels", "channel_mult",
    "num_blocks", "attn_resolutions", "dropout", "label_dropout", "channel_mult_emb",
))  # fmt: skip
ADM = {"label_dropout": 0}  # of the published networks: what a converted one is, and no other
SONG = {"decoder_type": "standard", "channel_mult_emb": 4, "label_dropout": 0}
KINDS: dict[str, dict[str, Any]] = {  # of SongUNet, by embedding_type: what else such a network has
    "positional": {"encoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1]},  # DDPM++
    "fourier": {
        "encoder_type": "residual",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
    },  # NCSN++
}


class Record:
    """An object of a class that is not imported: the name of that class, and what its state was."""

    kind = "?"

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state) if isinstance(state, Mapping) else {}


def _persistent(meta: Mapping[str, Any]) -> Record:
    """In place of torch_utils.persistence's function, which would run the code that meta holds."""
    made = Record()
    made.kind = str(meta["class_name"])
    made.__setstate__(meta["state"])
    return made


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage, copied, so that what it shares with others is not kept."""
    empty = torch.empty(0, dtype=storage.dtype)
    return empty.set_(storage._untyped_storage, offset, size, stride).clone()


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class _Dtype:
    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biuf":
            raise UserError(f"the pickle holds a number of type {name!r}; only plain numbers are read")

    def __setstate__(self, state: Any) -> None:
        """Byte order, which is this machine's for the networks published."""


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype.dtype)[0].item()


def _made(kind: type, *_: Any) -> Any:
    return kind.__new__(kind)


ALLOWED: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "copyreg._reconstructor": _made,
    "builtins.object": object,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in ALLOWED:
            return ALLOWED[full]
        if full == "dnnlib.util.EasyDict":
            return dict
        if full.startswith("torch.nn.modules.") and name[:1].isupper():
            return type(name, (Record,), {"kind": name})
        raise UserError(f"the pickle names {full}, which no network of EDM needs; it is not read")


def read(path: Path) -> Record:
    """The averaged network of a pickle. Raises UserError for any other."""
    try:
        with path.open("rb") as file:
            content = _Reader(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # of torn or foreign files, many types
        raise UserError(f"{path} cannot be read as a pickle of EDM ({error}); is it complete?") from error
    found = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(found, Record):
        raise UserError(f"{path} holds no network named ema; give one of EDM's network pickles")
    return found


def tensors_of(record: Record) -> dict[str, Tensor]:
    """Parameters and buffers by their names in a state dict."""
    found = {}
    for key in ("_parameters", "_buffers"):
        own = record.state.get(key) or {}
        found |= {name: value for name, value in own.items() if isinstance(value, Tensor)}
    for name, inner in (record.state.get("_modules") or {}).items():
        if isinstance(inner, Record):
            found |= {f"{name}.{key}": value for key, value in tensors_of(inner).items()}
    return found


def network_of(preconditioned: Record, path: Path) -> tuple[SongUNet | UNet2DModel, EDMEulerScheduler]:
    """The network with the weights of EDM's, and the scheduler that says its preconditioning."""
    inner = (preconditioned.state.get("_modules") or {}).get("model")
    kinds = preconditioned.kind, inner.kind if isinstance(inner, Record) else "nothing"
    if kinds not in (("EDMPrecond", "SongUNet"), ("EDMPrecond", "DhariwalUNet")):
        raise UserError(
            f"{path} is a {kinds[0]} of {kinds[1]}; read so far is an EDMPrecond of SongUNet or DhariwalUNet"
        )
    assert isinstance(inner, Record)
    make = _song if inner.kind == "SongUNet" else adm.network_of
    given = _arguments(preconditioned, inner, path)
    weights = tensors_of(inner)
    filters = [weights.pop(key) for key in [*weights] if key.endswith("resample_filter")]
    taps = torch.tensor(given.get("resample_filter", [1, 1]), dtype=torch.float32)
    said = torch.outer(taps, taps) / taps.sum().square()
    if not all(torch.equal(one.float().squeeze(), said) for one in filters):
        raise UserError(f"{path} has filters that its resample_filter {taps.int().tolist()} does not say")
    try:
        network = make(given, {key: value.float() for key, value in weights.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # torch and diffusers raise many types for arguments that make no network
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{path} has other weights than its arguments say ({said})") from error
    # sigma_min and sigma_max as its sampler has them; those of EDMPrecond are 0 and infinity
    sigma_data = float(preconditioned.state.get("sigma_data", 0.5))
    return network.eval(), EDMEulerScheduler(sigma_data=sigma_data)


def _arguments(outer: Record, inner: Record, path: Path) -> dict[str, Any]:
    """What the network was made with. Raises UserError for arguments that say something not known here."""
    if outer.state.get("_init_args") or inner.state.get("_init_args"):
        raise UserError(f"{path} was made with arguments without names; those of EDM's own have them")
    given = {**outer.state.get("_init_kwargs", {}), **inner.state.get("_init_kwargs", {})}
    fixed = dict(ADM)
    if inner.kind == "SongUNet":
        if (kind := given.setdefault("embedding_type", "positional")) not in KINDS:
            raise UserError(f"{path} has embedding_type {quoted(kind)}; read so far is {' or '.join(KINDS)}")
        fixed = {"embedding_type": kind, **SONG, **KINDS[kind]}
        given = {**KINDS["positional"], **given}  # which EDM has where nothing is said
    if unknown := sorted(map(str, given.keys() - COMMON - fixed.keys())):
        raise UserError(f"{path} has an argument {quoted(unknown[0])}, which is of no network read so far")
    for key, value in fixed.items():
        if key in given and given[key] not in (value, tuple(value) if isinstance(value, list) else value):
            raise UserError(f"{path} has {key} {given[key]!r}; read so far is {value!r}")
    channels = given.get("img_channels", given.get("in_channels", 3))
    return {"in_channels": channels, "out_channels": channels, **given}


def _song(given: Mapping[str, Any], weights: Mapping[str, Tensor]) -> SongUNet:
    network = SongUNet(
        sample_size=given["img_resolution"],
        in_channels=given["in_channels"],
        model_channels=given.get("model_channels", 128),
        channel_mult=tuple(given.get("channel_mult", (1, 2, 2, 2))),
        num_blocks=given.get("num_blocks", 4),
        attention=tuple(given.get("attn_resolutions", (16,))),
        dropout=given.get("dropout", 0.10),
        num_class_embeds=given.get("label_dim") or None,
        augment_dim=given.get("augment_dim", 0),
        fourier=given["embedding_type"] == "fourier",
        residual=given["encoder_type"] == "residual",
        wide=[*given["resample_filter"]] == [1, 3, 3, 1],
    )
    network.load_state_dict(weights)
    return network


def convert(path: Path, out: Path) -> None:
    """Writes a folder that `diffkd.load` opens: a stock pipeline, or diffkd's own network and a scheduler."""
    network, scheduler = network_of(read(path), path)
    if isinstance(network, UNet2DModel):
        pipeline = ConsistencyModelPipeline(unet=network, scheduler=scheduler)
        pipeline.save_pretrained(out, safe_serialization=True)
        return
    network.save_pretrained(out, safe_serialization=True)
    scheduler.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pickle", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        convert(arguments.pickle, arguments.out)
    except UserError as error:
        raise SystemExit(f"{error}") from error
    print(f"a teacher in {arguments.out}")
