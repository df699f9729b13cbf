"""The files of a model that a user names: a pipeline, or a network alone as training scripts leave it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffkd.core.scheduler_config import PRECONDITIONED, SCHEDULERS
from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.places import expanded
from diffkd.io.text import log, quoted, reason
from diffkd.models.pipeline_files import INDEX, MAX_NUMBER, PICKLE_SUFFIXES, STEM, in_words, read_object

CARD = "diffkd.json"
MERGED = "merged_lora"  # of a card: how a student learned that is no adapter any more
ADAPTER = "pytorch_lora_weights.safetensors"  # where stock pipelines look for one
# of a repository: configs, tokenizers, the weights of components; at its root lie copies for other programs
DOWNLOADED = [
    "*.json", "*.txt", "*.model", "*.jinja", "*/*.safetensors", "diffusion_pytorch_model*.safetensors",
    ADAPTER, "README.md",
]  # fmt: skip
SCHEDULER = "scheduler_config.json"
OF_OTHERS = ("single-file", "kohya", "onnx", "torch-export")  # exports that are no folder of a pipeline
# of a network among its siblings; first the averaged weights, which diffusers' scripts sample with
NETWORKS = ("unet_ema", "unet", "transformer_ema", "transformer")


@dataclass(frozen=True)
class Source:
    """Where a model's parts lie.

    folder: of the pipeline, or whatever the user named. name: the path or hub id that the user gave, for
    messages. index: the content of model_index.json, {} for a network alone. card: the content of
    diffkd.json, {} for a model that diffkd did not write. network: the folder of a network alone, None for a
    pipeline. variant, noise_scheduler: as given to `loading.load`. adapter: the folder of a student that is
    an adapter, None for others; all but the card and the scheduler is then of its base.
    """

    folder: Path
    name: str
    index: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    network: Path | None = None
    variant: str | None = None
    noise_scheduler: str | None = None
    adapter: Path | None = None

    @property
    def card_path(self) -> Path:
        return (self.adapter or self.folder) / CARD

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
        if named in SCHEDULERS or named in PRECONDITIONED:
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
    if (kind := card(folder).get("export", {}).get("kind")) in OF_OTHERS:
        raise UserError(
            f"{name} is an export of the kind {kind}, for other programs; give the student that it was "
            "made of"
        )
    if os.path.lexists(folder / INDEX):
        index = read_object(folder / INDEX)
        return Source(folder, name, index, card(folder), None, variant, scheduler)
    if holds_adapter(folder):
        return _of_adapter(folder, name, variant, scheduler)
    network = _network_in(folder)
    if network is None:
        inner = sorted(p.name for p in folder.glob("checkpoint-*") if p.is_dir() and holds_model(p))
        files = () if inner else sorted(folder.glob("*.safetensors"))
        remedy = f"one of its checkpoints ({', '.join(inner)})" if inner else "the folder that has it"
        remedy = in_words(files[0]) if files else f"give {remedy}"
        raise UserError(f"{name} is not a diffusers pipeline: it has no model_index.json; {remedy}")
    if network != folder:
        log.warning("%s: the network in %s is used", name, network.name)
    return Source(folder, name, {}, card(folder), network, variant, scheduler)


def _of_adapter(folder: Path, name: str, variant: str | None, scheduler: str | None) -> Source:
    """The base of a student that is an adapter, with the student's card and scheduler."""
    said = card(folder)
    if "lora" not in said:
        raise UserError(
            f"{name} is an adapter whose {CARD} does not name its base; give a student of diffkd, or the "
            "pipeline that it was fused into"
        )
    base = said["lora"]["base"]
    try:
        if holds_adapter(folder_of(base)):
            raise UserError(f"{base} is an adapter itself; run diffkd fuse on it, and name what this makes")
        found = find(base, variant or said["lora"].get("variant"), scheduler or str(folder / "scheduler"))
    except UserError as error:
        raise UserError(
            f"{name} is an adapter, and its base cannot be opened: {error}; or name its place as base in "
            f"{folder / CARD}"
        ) from error
    return replace(found, card=said, adapter=folder)


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is a student that is an adapter, and not a pipeline."""
    whole = os.path.lexists(folder / INDEX) or _network_in(folder) is not None
    return os.path.lexists(folder / ADAPTER) and not whole


def holds_model(folder: Path) -> bool:
    """Whether a folder is a pipeline, an adapter of one, or has a network alone."""
    return any(os.path.lexists(folder / one) for one in (INDEX, ADAPTER)) or _network_in(folder) is not None


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
    share = content.get("label_dropout", 1.0)
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise UserError(
            f"{path} has label_dropout {quoted(share)}, which is not a share from 0 to 1; repair it"
        )
    weights = content.get("guidance_range", [1.0, 1.0])
    if not (
        isinstance(weights, list)
        and len(weights) == 2
        and all(type(weight) in (int, float) and 0 <= weight <= MAX_NUMBER for weight in weights)
        and weights[0] <= weights[1]
    ):
        raise UserError(f"{path} has guidance_range {quoted(weights)}, which is not two weights; repair it")
    if not _is_guidance_kind(content.get("guidance_kind", {})):
        raise UserError(
            f"{path} has guidance_kind {quoted(content['guidance_kind'])}, which is no kind of guidance; "
            "repair or remove it"
        )
    call = content.get("call", {})
    if not isinstance(call, dict) or not all(
        key.isidentifier() and type(value) in (int, float, bool) for key, value in call.items()
    ):
        raise UserError(
            f"{path} has call {quoted(call)}, which is not numbers or booleans by name; repair or remove it"
        )
    absent = content.get("absent", [])
    if not isinstance(absent, list) or not all(isinstance(one, str) and one.isidentifier() for one in absent):
        raise UserError(f"{path} has absent {quoted(absent)}, which is not components; repair or remove it")
    if "lora" in content and not _is_adapter(content["lora"]):
        raise UserError(f"{path} has lora {quoted(content['lora'])}, which describes no adapter; repair it")
    merged = content.get(MERGED, {"rank": 1})
    if not isinstance(merged, dict) or type(merged.get("rank")) is not int:
        raise UserError(
            f"{path} has {MERGED} {quoted(merged)}, which describes no adapter; repair or remove it"
        )
    export = content.get("export", {})
    if not isinstance(export, dict) or not isinstance(export.get("kind", ""), str):
        raise UserError(f"{path} has export {quoted(export)}, which describes none; repair or remove it")
    metrics = content.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(record, dict) for record in metrics):
        raise UserError(f"{path} has metrics that are not a list of records; repair or remove them")
    return content


def _is_adapter(content: Any) -> bool:
    """Whether it is what `lora_files.facts` gives."""
    if not isinstance(content, dict):
        return False
    targets, guidance = content.get("targets"), content.get("guidance", 1)
    return (
        all(isinstance(content.get(key), str) for key in ("base", "fingerprint"))
        and isinstance(content.get("variant", ""), str)
        and type(content.get("rank")) is int
        and 1 <= content["rank"] <= MAX_NUMBER
        and isinstance(targets, list)
        and all(isinstance(one, str) for one in targets)
        and type(guidance) in (int, float)
        and 0 <= guidance <= MAX_NUMBER
    )


def _is_guidance_kind(content: Any) -> bool:
    """Whether it is what `guidance_kinds.in_words` reads."""
    if not isinstance(content, dict) or not content.keys() <= {"interval", "rescale", "worse"}:
        return False
    interval, worse = content.get("interval", [0, 0]), content.get("worse", {"path": ""})
    numbers = [content.get("rescale", 0), *(interval if isinstance(interval, list) else [None])]
    return (
        len(numbers) == 3
        and all(type(number) in (int, float) and 0 <= number <= MAX_NUMBER for number in numbers)
        and isinstance(worse, dict)
        and isinstance(worse.get("path"), str)
    )


def folder_of(path_or_hub_id: str | Path) -> Path:
    """The local folder of a model; for a hub id, its configs and safetensors are downloaded first."""
    path = Path(path_or_hub_id)
    if os.path.isdir(path):  # pathlib's own raises for a name that is too long
        return path
    if path.suffix.lower() in PICKLE_SUFFIXES and os.path.isfile(path):
        edm = ""
        if path.suffix.lower() == ".pkl":
            edm = f"a network of NVlabs' EDM is read by python scripts/convert_edm.py {path} FOLDER; else, "
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened; {edm}if you trust it, open it with "
            "diffusers, save it with pipeline.save_pretrained(folder, safe_serialization=True), and give it"
        )
    if path.suffix.lower() == ".safetensors" and os.path.isfile(path):
        raise UserError(in_words(path))
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
