"""Files from outside are not trusted: their code does not run, their names neither lead elsewhere nor reach a
terminal unescaped, and no secret is kept."""

from __future__ import annotations

import io
import json
import logging
import pickle
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import diffkd
from diffkd import methods
from diffkd.data import folder
from diffkd.errors import UserError, masked, one_line, printable
from diffkd.io import progress
from diffkd.io.npz import read_npz
from diffkd.io.text import quoted
from diffkd.metrics import features
from diffkd.metrics.evaluation import image_sets, image_sources
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.features.dinov2 import DINOv2
from diffkd.models import loading
from diffkd.runs import benchmark, benchmark_config, config, config_files, evaluate
from diffkd.runs.repeat import repeat
from diffkd.runs.reports import model_card, run_report, tables
from tests.measuring import measure

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def exploded(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("canary") / "exploded"


@pytest.fixture
def code(exploded) -> str:
    """The source of a module that leaves a file when it is imported."""
    return (
        f"from pathlib import Path\nPath({str(exploded)!r}).touch()\nimport torch\n"
        "class Mine(torch.nn.Module):\n    num_features = 3\n"
        "    def forward(self, x): return x.flatten(2).double().mean(2).expand(-1, 3)\n"
    )


def quiet() -> Console:
    return Console(file=io.StringIO())


# weights and code -----------------------------------------------------------------------------------------


def test_no_code_of_ours_trusts_remote_code():
    for path in Path(diffkd.__file__).parent.rglob("*.py"):
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
@pytest.mark.parametrize("way", [loading.load, loading.open_stock])
def test_a_folder_of_pickles_alone(tmp_path, make_pipeline, exploded, suffix, way):
    folder = make_pipeline(tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).with_suffix(suffix).write_bytes(pickle.dumps(Canary(exploded)))
    with pytest.raises(
        UserError, match=r"no safetensors.*save_pretrained\(folder, safe_serialization=True\)"
    ):
        way(folder)
    assert not exploded.exists()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".CKPT"])
def test_a_pickle_as_a_model(tmp_path, exploded, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Canary(exploded)))
    with pytest.raises(UserError, match="pickle.*safe_serialization=True"):
        loading.load(path)
    assert not exploded.exists()


@pytest.mark.parametrize(
    "unet",
    [["mine", "Mine"], ["mine_on_the_path", "Mine"], ["os", "system"], ["transformers", "AutoModel"],
     ["diffusers", "utils"], ["pipelines", "Mine"], ["diffusers"], [["mine"], "Mine"], ["diffusers", 3]],
)  # fmt: skip
def test_components_that_are_not_diffusers_own(tmp_path, make_pipeline, exploded, code, monkeypatch, unet):
    folder = make_pipeline(tmp_path)
    for place in ("unet/mine.py", "mine.py", "pipeline.py", "unet/pipeline.py"):
        (folder / place).write_text(code)
    (tmp_path / "mine_on_the_path.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": unet}))
    with pytest.raises(UserError, match="only classes of diffusers|cannot be opened"):
        loading.open_stock(folder)
    with pytest.raises(UserError):
        loading.load(folder)
    assert not exploded.exists()


@pytest.mark.parametrize("name", [["pipeline", "Mine"], ["pipeline.py", "Mine"], "pipeline", None, 3])
def test_a_pipeline_with_a_class_of_its_own(tmp_path, make_pipeline, exploded, code, name):
    folder = make_pipeline(tmp_path)
    (folder / "pipeline.py").write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    for way in (loading.load, loading.open_stock):
        with pytest.raises(UserError, match="not a supported|does not provide"):
            way(folder)
    assert not exploded.exists()


def test_code_beside_a_pipeline_does_not_matter(tmp_path, make_pipeline, exploded, code):
    folder = make_pipeline(tmp_path)
    for place in ("pipeline.py", "unet/unet.py", "diffusers.py", "unet/model.py"):
        (folder / place).write_text(code)
    assert loading.load(folder).shape == (1, 8, 8)
    assert type(loading.open_stock(folder)).__name__ == "DDIMPipeline"
    assert not exploded.exists()


@pytest.mark.parametrize("component", ["unet", "scheduler"])
def test_code_that_shadows_diffusers(tmp_path, make_pipeline, exploded, code, component):
    """diffusers imports <component>/<library>.py before the library itself, older versions without asking."""
    folder = make_pipeline(tmp_path)
    (folder / component / "diffusers.py").write_text(code)
    with pytest.raises(UserError, match="in a file of its own"):
        loading.open_stock(folder)
    assert loading.load(folder).shape == (1, 8, 8)  # it looks up only two classes of diffusers, by name
    assert not exploded.exists()


def test_an_auto_map_in_a_transformers_config_is_ignored(tmp_path, exploded, code):
    from transformers import Dinov2Config, Dinov2Model

    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 14,
        "patch_size": 7,
    }
    Dinov2Model(Dinov2Config(**small)).save_pretrained(tmp_path)
    known = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "mine.py").write_text(code)
    mapped = {name: "mine.Mine" for name in ("AutoConfig", "AutoModel", "AutoBackbone")}
    (tmp_path / "config.json").write_text(json.dumps({**known, "auto_map": mapped}))
    assert DINOv2(tmp_path).num_features == 8
    assert not exploded.exists()


def sharded(folder: Path, name: str) -> None:
    """Split the weights into two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    last = list(tensors)[-1]
    index = {"metadata": {}, "weight_map": {key: "a.safetensors" for key in tensors} | {last: name}}
    beside = {key: value for key, value in tensors.items() if key != last}
    save_file(beside, folder / "unet/a.safetensors", {"format": "pt"})
    save_file({last: tensors[last]}, (folder / "unet" / name).resolve(), {"format": "pt"})
    (folder / WEIGHTS).rename(folder / "unet/whole.safetensors.not")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def test_weights_in_several_files(tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    before = loading.load(folder).network.state_dict()
    sharded(folder, "b.safetensors")
    for key, value in loading.load(folder).network.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["../outside.safetensors", "../../outside.safetensors", "b.bin", "absolute"])
def test_an_index_does_not_lead_out_of_the_folder(tmp_path, make_pipeline, name):
    folder = make_pipeline(tmp_path)
    sharded(folder, str(tmp_path / "x.safetensors") if name == "absolute" else name)
    for way in (loading.load, loading.open_stock):
        with pytest.raises(UserError, match="not a safetensors file beside it"):
            way(folder)


def test_a_feature_index_does_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    index = {"metadata": {}, "weight_map": {"x": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a safetensors file beside it"):
        DINOv2(tmp_path)


def test_nothing_that_could_be_a_pickle_is_downloaded(tmp_path, monkeypatch):
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        raise OSError("fetched nothing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for fetch in (loading.load, loading.open_stock, DINOv2):
        with pytest.raises(UserError, match="fetched nothing"):
            fetch("some/body")
    # three are of tokenizers; templates of chats run in a sandbox; of the card the license is read
    plain = (".json", ".safetensors", ".txt", ".model", ".jinja", "README.md")
    assert asked and all(pattern.endswith(plain) for pattern in asked)


def test_missing_weights_are_not_initialised_at_random(tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("conv_in.weight")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="parameters and the weights are"):
        loading.open_stock(folder)


@pytest.mark.parametrize("opened", [loading.load, loading.open_stock])
def test_attention_with_no_heads(tmp_path, make_pipeline, opened):
    """diffusers builds it and divides by zero when it is called."""
    folder = make_pipeline(tmp_path)
    known = json.loads((folder / "unet/config.json").read_text())
    changes = {"add_attention": True, "attention_head_dim": 17}
    (folder / "unet/config.json").write_text(json.dumps({**known, **changes}))
    with pytest.raises(UserError, match="attention_head_dim 17, wider than the channels"):
        opened(folder)


@pytest.mark.parametrize(
    "changes",
    [{"block_out_channels": [10**9, 10**9]}, {"block_out_channels": [2**20] * 2}, {"layers_per_block": 10**9},
     {"block_out_channels": [-8, 16]}, {"in_channels": 10**12}, {"sample_size": 10**9}, {"sample_size": "8"},
     {"sample_size": [8, 8, 8]}, {"num_class_embeds": 10**9}, {"block_out_channels": [8] * 10_000},
     {"sample_size": float("nan")}, {"norm_num_groups": 0}, {"dropout": "x"}],
)  # fmt: skip
def test_a_network_of_absurd_size_takes_no_memory(tmp_path, make_pipeline, changes):
    folder = make_pipeline(tmp_path)
    known = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**known, **changes}))
    started = time.process_time()
    with pytest.raises(UserError):
        loading.load(folder)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "changes",
    [{"num_train_timesteps": 10**9}, {"num_train_timesteps": 0}, {"num_train_timesteps": 2.5},
     {"trained_betas": [0.1] * 200_000}, {"trained_betas": ["x"]}, {"trained_betas": [float("nan")]},
     {"beta_start": "x", "beta_schedule": "linear"}, {"beta_start": 7.0, "beta_schedule": "linear"},
     {"clip_sample": True, "clip_sample_range": "x"}, {"clip_sample": True, "clip_sample_range": -1}],
)  # fmt: skip
def test_absurd_schedules(tmp_path, make_pipeline, changes):
    folder = make_pipeline(tmp_path)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError):
        loading.load(folder)


# YAML -----------------------------------------------------------------------------------------------------

TRAIN = "out: run\ndata: {kind: digits}\n"


def read(tmp_path: Path, text: str, *overrides: str) -> config.Train:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    return config_files.load(tmp_path / "a.yaml", config.Train, overrides)


@pytest.mark.parametrize(
    ("text", "key", "number"),
    [("seed: 1\nseed: 2\n", "seed", 4), ("model:\n  layers: 1\n  dropout: 0.1\n  layers: 2\n", "layers", 6),
     ("out: again\n", "out", 3), ("evaluation: {metrics: [fid], metrics: [kid]}\n", "metrics", 3)],
)  # fmt: skip
def test_a_key_given_twice_is_named_with_its_line(tmp_path, text, key, number):
    with pytest.raises(UserError, match=f"key {key} is given twice, line {number}"):
        read(tmp_path, TRAIN + text)


def test_a_key_given_twice_in_an_override(tmp_path):
    with pytest.raises(UserError, match="key layers is given twice"):
        read(tmp_path, TRAIN, "model={layers: 1, layers: 2}")


def test_aliases_and_merged_keys_work(tmp_path):
    text = "out: run\ndata: {kind: digits}\nmodel: &m {channels: [8], norm_groups: 4}\n"
    assert read(tmp_path, text).model.channels == [8]
    merged = text + "denoising: &d {updates: 7}\ntraining: {batch_size: 3}\n"
    merged = merged.replace("model: &m", "model: &m").replace(
        "{updates: 7}", "{<<: {updates: 6}, updates: 7}"
    )
    assert read(tmp_path, merged).denoising.updates == 7


LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x]\n" + LAUGHS,
        "a0: &a0 {x: 1}\n" + LAUGHS.replace("[", "{<<: [").replace("]", "]}"),
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "[" * 100_000,
        "{a: " * 5_000,
        "- " * 50_000,
        "data: " + "[" * 60 + "]" * 60 + "\n",
        "x" * (2 << 20),
        "seed: 2020-13-45\n",
        "seed: 0x_\n",
        "seed: " + "9" * 10_000 + "\n",
        "seed: !!python/object/apply:os.system [true]\n",
        "seed: !!int ''\n",
        "seed: !!float _\n",
    ],
    ids=["laughs", "merged laughs", "recursive", "recursive keys", "deep", "deep keys", "dashes", "nested",
         "long",
         "date", "hexadecimal", "digits", "python", "empty int", "empty float"],
)  # fmt: skip
def test_hostile_yaml_is_refused_quickly_in_one_line(tmp_path, text):
    started = time.process_time()
    with pytest.raises(UserError) as error:
        read(tmp_path, text if text.startswith(("[", "{", "-", "x")) else TRAIN + text)
    assert time.process_time() - started < 5
    assert "a.yaml" in str(error.value) or "config key" in str(error.value)


@pytest.mark.parametrize(
    "override",
    ["seed=true", "training.batch_size=true", "denoising.learning_rate=true", "model.channels=[8, true]",
     "evaluation.labels=[false]", "evaluation.samples=true", "data={kind: folder, path: x, size: true}",
     "data={kind: folder, path: x, size: 8, channels: true}", "pictures=false"],
)  # fmt: skip
def test_true_is_not_a_number(tmp_path, override):
    with pytest.raises(UserError, match="'true'|'false'"):
        read(tmp_path, TRAIN, override)
    name = override.partition("=")[0]
    if "{" not in override:
        with pytest.raises(UserError, match=name):
            read(tmp_path, TRAIN, override)


@pytest.mark.parametrize("name", ["a\0b", "\udcff", "e" * 300])
def test_a_name_that_is_not_a_path(tmp_path, name):
    text = yaml.safe_dump({**yaml.safe_load(TRAIN), "method": {"steps": [4]}, "teacher": {"train": name}})
    (tmp_path / "a.yaml").write_text(text)
    if "\0" in name:
        with pytest.raises(UserError, match="teacher.train"):
            config_files.load(tmp_path / "a.yaml", config.Distill)
    else:
        assert config_files.load(tmp_path / "a.yaml", config.Distill).teacher.train.name == name
    with pytest.raises(UserError, match="cannot be read|is not valid YAML"):
        config_files.load(tmp_path / name, config.Train)


def test_booleans_stay_booleans(tmp_path):
    assert read(tmp_path, TRAIN, "classes=false", "model.attention=[true]").model.attention == [True]


# user code ------------------------------------------------------------------------------------------------

METHOD = """
from diffkd.methods.base import Method

class Own(Method):
    \"\"\"Mine.\"\"\"
    reference = "none"

    def stages(self, start):
        return []

    def losses(self, nets, batch, step, rng):
        yield
"""


@pytest.fixture
def own(tmp_path, monkeypatch, code):
    """own(text) -> the name of an importable module with that source."""
    monkeypatch.syspath_prepend(tmp_path)
    made: list[str] = []

    def make(text: str = code) -> str:
        name = f"own_{tmp_path.name}_{len(made)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(text)
        made.append(name)
        return name

    yield make
    for name in made:
        sys.modules.pop(name, None)


def announced(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if r.name == "diffkd" and "running user code" in r.getMessage()
    ]


def test_a_user_method_is_logged_once(tmp_path, monkeypatch, own, caplog):
    package = tmp_path / own("").replace("own_", "pack_")
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text(METHOD)
    name = f"{package.name}.mine"
    with caplog.at_level(logging.WARNING):
        assert methods.find(name) is methods.find(name)
        methods.find("progressive")
    assert announced(caplog) == [f"running user code: module {name} ({package / 'mine.py'})"]


def test_user_features_are_logged_once(tmp_path, own, caplog):
    name = own()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert features.load(f"{name}.Mine").num_features == 3
        features.load("digits")
    assert announced(caplog) == [f"running user code: module {name} ({tmp_path / name}.py)"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """A folder of real.npz, fake.npz, and r.json, the record of their distance."""
    folder, rng = tmp_path_factory.mktemp("evaluated"), np.random.default_rng(0)
    for name in ("real", "fake"):
        np.savez(folder / f"{name}.npz", arr_0=rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8))
    config = Evaluation(features="digits", metrics=["fid"])
    measure(folder / "fake.npz", folder / "real.npz", config, folder / "r.json")
    return folder


@pytest.fixture
def measured(tmp_path, evaluated) -> Path:
    """r.json in a copy of that folder."""
    return Path(shutil.copytree(evaluated, tmp_path, dirs_exist_ok=True)) / "r.json"


def test_a_record_cannot_name_code(measured, own, exploded):
    name = own()
    record = json.loads(measured.read_text())
    record["protocol"]["evaluation"]["features"] = f"{name}.Mine"
    measured.write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"r.json.*name it: features {name}.Mine"):
        repeat(measured, quiet())
    assert not exploded.exists() and name not in sys.modules


def test_a_record_is_repeated_with_code_that_the_user_names(tmp_path, measured, own):
    name = f"{own()}.Mine"
    config = Evaluation(features=name, metrics=["fid"])
    measure(tmp_path / "fake.npz", tmp_path / "real.npz", config, measured)
    assert repeat(measured, quiet(), features_name=name)
    with pytest.raises(UserError, match="leave out --features digits"):
        repeat(measured, quiet(), features_name="digits")


def test_a_reference_cannot_name_code(tmp_path, own, exploded, cli):
    name = own()
    protocol = json.dumps({"features": {"name": f"{name}.Mine"}})
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3), protocol=protocol)
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 4, 4, 3), np.uint8))
    code, out, err = cli("evaluate", tmp_path / "x.npz", "--reference", tmp_path / "ref.npz")
    assert (code, out) == (2, "") and f"name it: --features {name}.Mine" in err
    assert not exploded.exists() and name not in sys.modules


def test_a_card_cannot_name_code(tmp_path, make_pipeline, own, exploded):
    folder, name = make_pipeline(tmp_path), own()
    settings = {"method": [{"name": f"{name}.Mine"}], "evaluation": {"features": f"{name}.Mine"}}
    card = {
        "steps": 4,
        "method": f"{name}.Mine",
        "sampler": f"{name}.Mine",
        "config": settings,
        "metrics": [],
    }
    (folder / "diffkd.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="neither ddim nor renoise"):
        loading.load(folder)
    (folder / "diffkd.json").write_text(json.dumps({**card, "sampler": "ddim"}))
    assert loading.load(folder).steps == 4
    loading.open_stock(folder)
    assert not exploded.exists() and name not in sys.modules


# names ----------------------------------------------------------------------------------------------------

HOSTILE = ["\x1b[31mred\x07", "a\nb", "a\rb", "\x1b]0;title\x07", "e" * 200, "<script>alert(1)</script>",
           "[/red]",
           "|x|`y`", "\u202egnp", "--out", "'; rm", "ü", "\x7f", "$HOME", "%s%n"]  # fmt: skip


@pytest.fixture
def terminal() -> Console:
    """A console that escapes nothing."""
    return Console(file=io.StringIO(), force_terminal=False, width=10_000)


def clean(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore::UserWarning:matplotlib")
def test_class_folders_with_hostile_names(tmp_path, image_folder, caplog, name):
    root = image_folder(tmp_path, classes=["a", "b"], count=3)
    (root / "b").rename(root / name.replace("/", "_"))
    images = folder.Folder(kind="folder", path=root, size=8).load()
    assert images.class_counts == [3, 3] and name.replace("/", "_") in images.classes
    (root / name.replace("/", "_") / "x.png").write_text("no image")
    with pytest.raises(UserError) as error, caplog.at_level(logging.WARNING):
        folder.Folder(kind="folder", path=root, size=8).load()
    assert clean(str(error.value)) and all(clean(r.getMessage()) for r in caplog.records) and caplog.records
    with pytest.raises(UserError) as error:
        image_sources.FolderSource(root, None)
    assert clean(str(error.value)) and "x.png" in str(error.value)


def test_names_that_are_not_utf_8(tmp_path, image_folder, caplog):
    root = image_folder(tmp_path, classes=["a", "b"], count=3)
    (root / "b").rename(root / "\udcff\udcfe")
    images = folder.Folder(kind="folder", path=root, size=8).load()
    assert images.class_counts == [3, 3]
    assert json.loads(json.dumps(images.classes)) == ["a", "\udcff\udcfe"]
    (root / "\udcff\udcfe" / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"x\.png") as error:
        image_sources.FolderSource(root, None)
    str(error.value).encode()
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    tables.show(Console(file=out), ["model", "\udcff"], [["\udcff", "1"]])


@pytest.mark.parametrize("name", [*HOSTILE, "\udcff"])
def test_names_in_a_terminal(tmp_path, name, terminal):
    tables.show(terminal, [name], [[name]])
    progress.say(terminal, name)
    said = terminal.file.getvalue()
    assert clean(said) and said.count(printable(name)) == 3


@pytest.mark.parametrize("name", [*HOSTILE, "\udcff"])
def test_names_in_a_benchmark(tmp_path, name, measured, terminal):
    record = json.loads(measured.read_text())
    model = benchmark_config.BenchmarkEntry(path="x/y", name=name)
    assert model.title == printable(name)
    record["model"] = record["protocol"]["reference"]["name"] = record["protocol"]["features"]["name"] = (
        model.title
    )
    benchmark._write(tmp_path, [record])
    written = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "<script>" not in written and clean(written)
    assert {row.count("|") for row in written.splitlines()[:3]} == {written.splitlines()[0].count("|")}
    benchmark._show(terminal, [record])
    assert clean(terminal.file.getvalue())


@pytest.mark.parametrize("name", [*HOSTILE, "\udcff", "---\nlicense: evil"])
def test_names_in_a_card(tmp_path, make_pipeline, measured, name):
    denoiser = loading.load(make_pipeline(tmp_path))
    record = json.loads(measured.read_text())
    record["protocol"]["reference"]["name"] = name
    model_card.write(
        tmp_path, model_card.describe(denoiser, teacher=name, method=name, classes=[name], metrics=[record])
    )
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    front = text.split("---\n")[1]
    assert yaml.safe_load(front) == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "distillation", "diffkd"],
    }
    assert "<script>" not in text and clean(text) and "evil" not in front
    assert loading.card(tmp_path)["classes"] == [name]


@pytest.mark.parametrize(
    "name", ["\x1b[31mred\x07", "a\nb", "e" * 200, "<script>alert(1)</script>", "\udcff"]
)
def test_names_in_a_report(tmp_path, measured, name):
    pytest.importorskip("matplotlib")
    folder = tmp_path / name.replace("/", "_")
    (folder / "samples").mkdir(parents=True)
    record = json.loads(measured.read_text())
    record["protocol"]["target"]["path"] = name
    rows = [{**record, "model": name, "role": role, "steps": 2} for role in ("teacher", "student")]
    (folder / "metrics.json").write_text(json.dumps(rows))
    line = {"stage": name, "stage_index": 0, "update": 1, "updates": 2, "loss": 0.5, "loss_by_noise": [0.5]}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "environment.json").write_text(json.dumps({name: [name]}))
    Image.new("L", (64, 64)).save(folder / "samples" / f"{name.replace('/', '_')}.png")
    page = run_report.write(folder).read_text(encoding="utf-8")
    assert "<script" not in page and clean(page)


def test_a_report_of_malformed_files(tmp_path):
    pytest.importorskip("matplotlib")
    for metrics in (
        "[" * 9999,
        "3",
        '{"steps": 1}',
        '[{"steps": "x", "fid": 1}, {"steps": 2, "fid": 1, "protocol": 3}]',
    ):
        (tmp_path / "metrics.json").write_text(metrics)
        assert run_report.write(tmp_path) is not None


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "evil\x1b[31m", "e" * 300])
def test_archive_members_are_not_extracted(tmp_path, name, monkeypatch):
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    np.savez(place / "x.npz", **{name: np.zeros(3)})
    before = sorted(tmp_path.rglob("*"))
    assert list(read_npz("x.npz")) == [name]
    with pytest.raises(UserError, match="holds no images") as error:
        image_sets.images_of(image_sets.File(path=place / "x.npz"))
    assert clean(str(error.value))
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/evil.npy").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/..",
        "./a",
        "a/../b",
        "/etc/passwd",
        "a/b\x1b[31m",
        "a/b\n",
        "-a/b",
        "a/" + "b" * 300,
        "b" * 300,
        "b\0",
    ],
)
def test_malformed_hub_ids(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError) as error:
        loading.load(name)
    assert clean(str(error.value))
    for read in (image_sets.parse, lambda text: DINOv2(text), lambda text: evaluate.open_reference(text)):
        with pytest.raises(UserError) as error:
            read(name)
        assert clean(str(error.value))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_circular_links(tmp_path, image_folder):
    root = image_folder(tmp_path, classes=["a", "b"], count=3)
    (root / "a" / "up").symlink_to(root, target_is_directory=True)
    assert len(image_sources.FolderSource(root, None)) == 6
    assert folder.Folder(kind="folder", path=root, size=8).load().class_counts == [3, 3]
    (root / "loop").symlink_to(root, target_is_directory=True)
    assert folder.Folder(kind="folder", path=root, size=8).load().class_counts[:2] == [3, 3]
    (root / "b" / "one.png").symlink_to(root / "b" / "two.png")
    (root / "b" / "two.png").symlink_to(root / "b" / "one.png")
    with pytest.raises(UserError, match="2 of 8 images in .* cannot be read"):
        folder.Folder(kind="folder", path=root, size=8).load()


# secrets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://user:pass@host/x", "https://***@host/x"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://u:p@ss@host/x", "https://***@host/x"),
        ("404 for hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345", "404 for ***"),
        ("(hf_abcdefghijklmnopqrst)", "(***)"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("https://x/y?X-Amz-Signature=0af&part=1", "https://x/y?X-Amz-Signature=***&part=1"),
        ("hub.token=abc", "hub.token=***"),
        ("--password = 'abc'", "--password = '***'"),
        ("ghp_0123456789abcdefABCDEF", "***"),
        ("api_key=abc", "api_key=***"),
    ],
)
def test_what_looks_like_a_secret_is_masked(text, kept):
    assert masked(text) == kept == masked(kept)


@pytest.mark.parametrize(
    "text",
    ["runs/hf_mirror/x", "hf_datasets/cifar10", "hf://datasets/a/b@main/x", "training.batch_size=4", "a@b.de",
     "sk-learn", "https://host/x@2", "tokens", "seed=1"],
)  # fmt: skip
def test_what_is_not_a_secret_is_kept(text):
    assert masked(text) == text


def test_secrets_reach_neither_errors_nor_logs(tmp_path, monkeypatch, cli, caplog):
    secret = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
    monkeypatch.setenv("HF_TOKEN", secret)

    def download(*_: Any, **__: Any) -> str:
        raise OSError(
            f"401 for https://me:{secret}@huggingface.co/x?token={secret}\nheaders: Bearer {secret}"
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("sample", "some/body", "--out", "drawn")
    assert code == 2 and secret not in out + err and "***" in err
    with pytest.raises(UserError) as error:
        loading.load("some/body")
    assert secret not in str(error.value)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffkd").warning("unreadable: %s (%s)", f"https://a:{secret}@h", 3)
    assert secret not in caplog.text


def test_a_long_line_keeps_its_end():
    said = one_line("a" * 10_000 + "; use another")
    assert len(said) < 2_100 and said.endswith("use another")
    assert quoted([1] * 9999).endswith("...") and len(quoted(10**5000)) < 300
