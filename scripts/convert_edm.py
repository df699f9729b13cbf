"""Converts a network of NVlabs' EDM or EDM2 from its pickle to safetensors that diffkd opens as a teacher.

python scripts/convert_edm.py edm-imagenet-64x64-cond-adm.pkl models/edm-imagenet64
python scripts/convert_edm.py edm2-img64-s-1073741-0.045.pkl models/edm2-img64-s
python scripts/convert_edm.py edm2-img512-s-2147483-0.070.pkl models/edm2-img512-s --vae sd-vae-ft-mse

No code of the pickle is run: of what it names, tensors are rebuilt, and all else becomes a record of its
state. Read so far, inside EDMPrecond: DhariwalUNet, which is ADM (ImageNet), as a stock pipeline; SongUNet,
which is DDPM++ or NCSN++ (the VP and VE networks of CIFAR-10, FFHQ and AFHQv2), as a network that diffkd
alone opens. So are the networks of EDM2 (ImageNet), a UNet inside Precond: those of pixels, and with --vae, a
folder of the autoencoder whose latents they were trained on, those of latents.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConsistencyModelPipeline, EDMEulerScheduler, UNet2DModel
from edm_reader import Array, Record, read, tensors_of
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import a_or_an, quoted
from diffkd.models import adm, edm2, networks
from diffkd.models.edm2_unet import EDM2UNet
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
PIXELS, LATENTS = "StandardRGBEncoder", "StabilityVAEEncoder"  # of EDM2; EDM is of pixels
SCALED = 0.5  # deviation of the latents of EDM2
Network = SongUNet | EDM2UNet | UNet2DModel


def network_of(preconditioned: Record, path: Path) -> tuple[Network, EDMEulerScheduler]:
    """The network with the weights of EDM's, and the scheduler that says its preconditioning."""
    parts = preconditioned.state.get("_modules") or {}
    inner = parts.get("unet" if preconditioned.kind == "Precond" else "model")
    kinds = preconditioned.kind, inner.kind if isinstance(inner, Record) else "nothing"
    if kinds not in (("EDMPrecond", "SongUNet"), ("EDMPrecond", "DhariwalUNet"), ("Precond", "UNet")):
        raise UserError(
            f"{path} is {a_or_an(kinds[0])} of {kinds[1]}; read so far is an EDMPrecond of SongUNet or "
            "DhariwalUNet, or EDM2's Precond of UNet"
        )
    assert isinstance(inner, Record)
    given, weights = _given(preconditioned, inner, path), tensors_of(inner)
    if inner.kind == "UNet":
        make = edm2.network_of
    else:
        make = _song if inner.kind == "SongUNet" else adm.network_of
        given = _checked(given, inner.kind, path)
        _take_filters(weights, given, path)
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


def _take_filters(weights: dict[str, Tensor], given: Mapping[str, Any], path: Path) -> None:
    """Takes the filters out. Raises UserError for others than the arguments say."""
    filters = [weights.pop(key) for key in [*weights] if key.endswith("resample_filter")]
    taps = torch.tensor(given.get("resample_filter", [1, 1]), dtype=torch.float32)
    said = torch.outer(taps, taps) / taps.sum().square()
    if not all(torch.equal(one.float().squeeze(), said) for one in filters):
        raise UserError(f"{path} has filters that its resample_filter {taps.int().tolist()} does not say")


def _given(outer: Record, inner: Record, path: Path) -> dict[str, Any]:
    """What the network was made with."""
    if outer.state.get("_init_args") or inner.state.get("_init_args"):
        raise UserError(f"{path} was made with arguments without names; those of EDM's own have them")
    return {**outer.state.get("_init_kwargs", {}), **inner.state.get("_init_kwargs", {})}


def _checked(given: Mapping[str, Any], kind: str, path: Path) -> dict[str, Any]:
    """The arguments of EDM's networks. Raises UserError for those that say something not known here."""
    fixed = dict(ADM)
    if kind == "SongUNet":
        embedding = given.get("embedding_type", "positional")
        if embedding not in KINDS:
            raise UserError(
                f"{path} has embedding_type {quoted(embedding)}; read so far is {' or '.join(KINDS)}"
            )
        fixed = {"embedding_type": embedding, **SONG, **KINDS[embedding]}
        # which EDM has where nothing is said
        given = {"embedding_type": embedding, **KINDS["positional"], **given}
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


def autoencoder_of(encoder: Record, vae: Path | None, path: Path) -> AutoencoderKL:
    """The autoencoder in a folder, with the means and deviations that EDM2 normalises its latents by."""
    name, scale, bias = (encoder.state.get(key) for key in ("vae_name", "scale", "bias"))
    if vae is None:
        raise UserError(f"{path} works in the latents of {quoted(name)}; name a folder of it as --vae")
    if not (isinstance(scale, Array) and isinstance(bias, Array)):
        raise UserError(f"{path} does not say how it normalises latents; give one of EDM2's network pickles")
    scale, bias = (torch.from_numpy(one.values).double() for one in (scale, bias))
    made: AutoencoderKL = networks.read_from(vae, str(vae), AutoencoderKL)
    if made.config.latent_channels != len(scale):
        raise UserError(
            f"{vae} has latents of {made.config.latent_channels} channels, and {path} normalises "
            f"{len(scale)}; give {quoted(name)}"
        )
    # which has (latents - mean) scaling_factor / std for scale latents + bias
    made.register_to_config(
        latents_mean=(-bias / scale).tolist(), latents_std=(SCALED / scale).tolist(), scaling_factor=SCALED
    )
    return made


def convert(path: Path, out: Path, vae: Path | None = None) -> None:
    """Writes a folder that `diffkd.load` opens: a stock pipeline, or diffkd's own network and a scheduler,
    and beside them the autoencoder of latents. vae: a folder of it."""
    content = read(path)
    network, scheduler = network_of(content.network, path)
    encoder = PIXELS if content.encoder is None else content.encoder.kind
    if encoder not in (PIXELS, LATENTS):
        raise UserError(f"{path} has an encoder {quoted(encoder)}; read so far is {PIXELS} or {LATENTS}")
    if encoder == LATENTS:
        assert content.encoder is not None
        autoencoder_of(content.encoder, vae, path).save_pretrained(out / "vae", safe_serialization=True)
    elif vae is not None:
        raise UserError(f"{path} works on pixels, and --vae names an autoencoder; leave it out")
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
    parser.add_argument("--vae", type=Path, help="a folder of the autoencoder of EDM2's latents")
    arguments = parser.parse_args()
    try:
        convert(arguments.pickle, arguments.out, arguments.vae)
    except UserError as error:
        raise SystemExit(f"{error}") from error
    print(f"a teacher in {arguments.out}")
