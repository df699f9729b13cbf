"""The files of a model that a user names: a pipeline, or a network alone as training scripts leave it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffkd.core.scheduler_config import SCHEDULERS
from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.places import expanded
from diffkd.io.text import log, quoted, reason
from diffkd.models.pipeline_files import INDEX, MAX_NUMBER, PICKLE_SUFFIXES, STEM, read_object

CARD = "diffkd.json"
# of a repository: configs, tokenizers, the weights of components; at its root lie copies for other programs
DOWNLOADED = ["*.json", "*.txt", "*.model", "*/*.safetensors", "diffusion_pytorch_model*.safetensors"]
SCHEDULER = "scheduler_config.json"
# of a network among its siblings; first the averaged weights, which diffusers' scripts sample with
NETWORKS = ("unet_ema", "unet", "transformer_ema", "transformer")


@dataclass(frozen=True)
class Source:
    """Where a model's parts lie.

    folder: of the pipeline, or whatever the user named. name: the path or hub id that the user gave, for
    messages. index: the content of model_index.json, {} for a network alone. card: the content of
    diffkd.json, {} for a model that diffkd did not write. network: the folder of a network alone, None for a
    pipeline. variant, noise_scheduler: as given to `loading.load`.
    """

    folder: Path
    name: str
    index: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    network: Path | None = None
    variant: str | None = None
    noise_scheduler: str | None = None

    def place_of(self, component: str) -> Path:
        """The folder of the network that a pipeline calls `component`: early repositories have it at the
        root."""
        if self.network is not None:
            return self.network
        inner = self.folder / component
        return inner if inner.is_dir() else self.folder

    def scheduler(self) -> tuple[str, dict[str, Any]]:
        """The class name and the config of the noise scheduler: the one that was named, else the model's own.

        Raises UserError where there is none.
        """
        if self.noise_scheduler is not None:
            return self._named_scheduler(self.noise_scheduler)
        root = self.folder
        places = [root / "scheduler", root]
        if self.network is not None:  # a checkpoint or a component inside a training script's output
            for parent in [*root.absolute().parents][:2]:
                places += [parent / "scheduler", parent]
        for place in places:
            if os.path.lexists(place / SCHEDULER):
                config = read_object(place / SCHEDULER)
                entry = self.index.get("scheduler")  # diffusers builds the class that the index names
                return str(entry[-1] if isinstance(entry, list) and entry else _class_of(config)), config
        if self.network is None:
            raise UserError(f"{self.name} has no {SCHEDULER}; save the pipeline with save_pretrained")
        raise UserError(
            f"{self.name} is a network without its noise scheduler; name the one that it was trained with as "
            f"{called('scheduler')}: a {SCHEDULER}, a pipeline's folder, or a class with its default "
            "settings, such as DDPMScheduler"
        )

    def _named_scheduler(self, named: str) -> tuple[str, dict[str, Any]]:
        path = expanded(named)
        for place in (path, path / SCHEDULER, path / "scheduler" / SCHEDULER):
            if os.path.isfile(place):
                config = read_object(place)
                return _class_of(config), config
        if named in SCHEDULERS:
            return named, {"_class_name": named}
        raise UserError(
            f"{called('scheduler')} {quoted(named)} is neither a {SCHEDULER}, nor a folder that has one, nor "
            f"a class of diffusers that is supported ({', '.join(SCHEDULERS[:3])}, ...)"
        )


def _class_of(config: dict[str, Any]) -> str:
    return str(config.get("_class_name", "DDPMScheduler"))


def find(path_or_hub_id: str | Path, variant: str | None = None, scheduler: str | None = None) -> Source:
    """The source of a model. Raises UserError where there is none."""
    folder, name = folder_of(path_or_hub_id), str(path_or_hub_id)
    if os.path.lexists(folder / INDEX):
        index = read_object(folder / INDEX)
        return Source(folder, name, index, card(folder), None, variant, scheduler)
    network = _network_in(folder)
    if network is None:
        inner = sorted(p.name for p in folder.glob("checkpoint-*") if p.is_dir() and holds_model(p))
        remedy = f"one of its checkpoints ({', '.join(inner)})" if inner else "the folder that has it"
        raise UserError(f"{name} is not a diffusers pipeline: it has no model_index.json; give {remedy}")
    if network != folder:
        log.warning("%s: the network in %s is used", name, network.name)
    return Source(folder, name, {}, card(folder), network, variant, scheduler)


def holds_model(folder: Path) -> bool:
    """Whether a folder is a pipeline, or has a network alone."""
    return os.path.lexists(folder / INDEX) or _network_in(folder) is not None


def _network_in(folder: Path) -> Path | None:
    """The folder of a network that has no pipeline around it: this one, or the first of `NETWORKS` in it."""
    for place in (folder, *(folder / name for name in NETWORKS)):
        if os.path.lexists(place / "config.json") and any(place.glob(f"{STEM}*")):
            return place
    return None


def card(folder: Path) -> dict[str, Any]:
    """The content of diffkd.json, which diffkd writes beside its pipelines; {} for other pipelines."""
    path = folder / CARD
    content = read_object(path) if os.path.lexists(path) else {}
    for key, least in {"steps": 1, "num_classes": 1, "null_label": 0, "num_train_timesteps": 1}.items():
        value = content.get(key)
        if value is not None and (type(value) is not int or not least <= value <= MAX_NUMBER):
            raise UserError(
                f"{path} has {key} {quoted(value)}, which is not an integer from {least}; repair it"
            )
    if content.get("sampler", "ddim") not in ("ddim", "renoise"):
        raise UserError(
            f"{path} has sampler {quoted(content['sampler'])}, which is neither ddim nor renoise; repair it"
        )
    guidance = content.get("guidance_baked_in", 1.0)
    if type(guidance) not in (int, float) or not 0 <= guidance <= MAX_NUMBER:
        raise UserError(f"{path} has guidance_baked_in {quoted(guidance)}, which is not a weight; repair it")
    weights = content.get("guidance_range", [1.0, 1.0])
    if not (
        isinstance(weights, list)
        and len(weights) == 2
        and all(type(weight) in (int, float) and 0 <= weight <= MAX_NUMBER for weight in weights)
        and weights[0] <= weights[1]
    ):
        raise UserError(f"{path} has guidance_range {quoted(weights)}, which is not two weights; repair it")
    call = content.get("call", {})
    if not isinstance(call, dict) or not all(
        key.isidentifier() and type(value) in (int, float) for key, value in call.items()
    ):
        raise UserError(f"{path} has call {quoted(call)}, which is not numbers by name; repair or remove it")
    absent = content.get("absent", [])
    if not isinstance(absent, list) or not all(isinstance(one, str) and one.isidentifier() for one in absent):
        raise UserError(f"{path} has absent {quoted(absent)}, which is not components; repair or remove it")
    metrics = content.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(record, dict) for record in metrics):
        raise UserError(f"{path} has metrics that are not a list of records; repair or remove them")
    return content


def folder_of(path_or_hub_id: str | Path) -> Path:
    """The local folder of a model; for a hub id, its configs and safetensors are downloaded first."""
    path = Path(path_or_hub_id)
    if os.path.isdir(path):  # pathlib's own raises for a name that is too long
        return path
    if path.suffix.lower() in PICKLE_SUFFIXES and os.path.isfile(path):
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened; if you trust it, open it with "
            "diffusers, save it with pipeline.save_pretrained(folder, safe_serialization=True), and give it"
        )
    if path.suffix.lower() == ".safetensors" and os.path.isfile(path):
        raise UserError(
            f"{path} is weights without their config; give the folder of the network or of the pipeline"
        )
    if (
        os.path.exists(path)
        or str(path_or_hub_id).count("/") != 1
        or str(path_or_hub_id).startswith((".", "/", "~"))
    ):
        raise UserError(
            f"{path_or_hub_id} is neither a pipeline's folder nor a hub id (owner/name); check the path"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub's client and the network raise many types
        raise UserError(
            f"{path_or_hub_id} is not a local folder and could not be downloaded from the hub "
            f"({reason(error)}); check the name, or download it and give its folder"
        ) from error
