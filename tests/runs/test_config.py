"""Configs: what is in configs/, what an override does, and what a misspelt key is answered."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
import pytest
import yaml

import diffkd
from diffkd.data.digits import Digits
from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset
from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.methods.denoising import Denoising
from diffkd.methods.progressive import Progressive
from diffkd.metrics.evaluation.image_sets import parse
from diffkd.runs import config
from diffkd.runs.benchmark_config import Benchmark
from diffkd.runs.classification.config import DistillClassifier
from diffkd.runs.config import Distill, Train
from diffkd.runs.config_files import load, resolved
from diffkd.runs.latent_teacher.config import KINDS as LATENT

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")
TRAIN = "out: runs/t\ndata: {kind: folder, path: images, size: 8}\n"
DISTILL = (
    "out: runs/d\nteacher: {path: teacher}\ndata: {kind: digits}\n"
    "method: {name: progressive, steps: [8, 4, 2]}\n"
)
KINDS = {
    "train": Train, "distill": Distill, "classify": DistillClassifier, "benchmark": Benchmark,
    **{f"train {kind}": made for kind, made in LATENT.items()},
}  # fmt: skip


def command_of(path: Path) -> str:
    keys = yaml.safe_load(path.read_text(encoding="utf-8")).keys()
    return "benchmark" if "models" in keys else "distill" if "teacher" in keys else "train"


def kind_of(path: Path) -> Any:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if kind := content.get("model", {}).get("kind"):
        return LATENT[kind]
    return DistillClassifier if "students" in content else KINDS[command_of(path)]


def written(tmp_path: Path, content: str | dict[str, Any], name: str = "c.yaml") -> Path:
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def train(tmp_path: Path, *overrides: str, content: str = TRAIN) -> Train:
    return load(written(tmp_path, content), Train, overrides)


def distill(tmp_path: Path, *overrides: str, content: str = DISTILL) -> Distill:
    return load(written(tmp_path, content), Distill, overrides)


# the files in configs/ ------------------------------------------------------------------------------------


def test_there_are_configs():
    assert {kind_of(path) for path in FILES} == set(KINDS.values())


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_config_is_of_one_kind_and_resolves_to_itself(path, tmp_path):
    kind = kind_of(path)
    once = resolved(load(path, kind))
    assert resolved(load(written(tmp_path, once), kind)) == once
    for other in set(KINDS.values()) - {kind}:
        with pytest.raises(UserError):
            load(path, other)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_value_of_a_config_is_read(path):
    def check(written: Any, read: Any, where: str) -> None:
        if (where == ".method" or where.endswith(".guidance")) and isinstance(read, list):
            written = written if isinstance(written, list) else [written]
        if isinstance(written, dict):
            for key, value in written.items():
                if (where, key) != (".teacher", "train"):
                    check(value, read[key], f"{where}.{key}")
        elif isinstance(written, list):
            assert len(written) == len(read), where
            for i, value in enumerate(written):
                check(value, read[i], f"{where}.{i}" if where != ".method" else "")
        elif where == ".evaluation.reference":
            assert read == parse(written).model_dump(mode="json")
        else:
            assert read == written, where

    check(yaml.safe_load(path.read_text(encoding="utf-8")), resolved(load(path, kind_of(path))), "")


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_teacher_to_be_trained_has_a_config(path):
    content = load(path, kind_of(path))
    if isinstance(content, Distill) and content.teacher.train is not None:
        teacher = load(content.teacher.train, kind_of(content.teacher.train))
        assert teacher.out != content.out
        assert teacher.data == content.data


# dry run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_dry_run_prints_a_config_that_reads_the_same(path, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = command_of(path)
    overrides = ["seed=7", "training.batch_size=32", "evaluation=null"]
    if command == "benchmark":
        overrides = ["evaluation.seed=7"]
    if kind_of(path) is DistillClassifier:  # it has no evaluation
        overrides = overrides[:2]
    code, out, err = cli(command, path, *overrides, "--dry-run")
    assert (code, err) == (0, "") and list(tmp_path.iterdir()) == []
    again = resolved(load(written(tmp_path, out), kind_of(path)))
    assert again == resolved(load(path, kind_of(path), overrides))
    if command == "benchmark":
        assert again["evaluation"]["seed"] == 7
    else:
        assert again["seed"] == 7 and again["training"]["batch_size"] == 32
        assert again.get("evaluation") is None


def test_a_dry_run_by_a_relative_path_still_finds_the_teacher(tmp_path, cli, monkeypatch):
    """The resolved config is kept in the run folder, far from where the teacher's file was relative to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    teacher = written(tmp_path / "configs", TRAIN, "teacher.yaml")
    written(tmp_path / "configs", DISTILL.replace("path: teacher", "train: teacher.yaml"), "d.yaml")
    code, out, err = cli("distill", "configs/d.yaml", "--dry-run")
    assert (code, err) == (0, "")
    again = load(written(tmp_path / "elsewhere", out), Distill)
    assert again.teacher.train is not None and again.teacher.train.resolve() == teacher.resolve()


# overrides ------------------------------------------------------------------------------------------------


def test_overrides_nested_and_later_ones_win(tmp_path):
    content = train(
        tmp_path, "seed=3", "denoising.learning_rate=5e-4", "training.ema=0.5", "training.ema=0.25",
        "evaluation.samples=10", "model.channels=[16, 32]", "model.channels.1=64", "out=runs/other",
        "data.path=a=b", "training.max_grad_norm=null", "training.precision=bf16",
        "schedule.zero_terminal_snr=false", "schedule.beta_end=1.5e-2", "prediction=sample",
    )  # fmt: skip
    assert content.seed == 3 and content.denoising.learning_rate == 0.0005
    assert content.training.ema == 0.25 and content.training.max_grad_norm is None
    assert content.training.precision == "bf16"
    assert content.evaluation is not None and content.evaluation.samples == 10
    assert content.model.channels == [16, 64] and content.out == Path("runs/other")
    assert isinstance(content.data, Folder) and content.data.path == Path("a=b") and content.data.size == 8
    assert content.schedule.zero_terminal_snr is False and content.schedule.beta_end == 0.015
    assert content.prediction == "sample"


def test_overrides_of_a_method_and_of_a_list_of_them(tmp_path):
    assert distill(tmp_path, "method.steps.0=16").method[0].steps == [16, 4, 2]
    assert distill(tmp_path, "method.steps=[1]", "method.alpha=0.5").method[0].alpha == 0.5
    two = DISTILL.split("method:")[0] + "method:\n- {steps: [8]}\n- {name: progressive, steps: [4]}\n"
    content = distill(tmp_path, "method.1.steps.0=2", "method.0.updates=9", content=two)
    assert [m.steps for m in content.method] == [[8], [2]]
    assert [m.updates for m in content.method] == [9, 250]


def test_null_takes_a_section_away_and_a_key_brings_it_back(tmp_path):
    assert train(tmp_path, "evaluation=null").evaluation is None
    content = train(tmp_path, "evaluation.samples=5", content=TRAIN + "evaluation: null\n")
    assert content.evaluation is not None and content.evaluation.samples == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"override 'seed' is not of the form key\.sub=value"),
        ("=3", r"override '=3' is not of the form"),
        ("seed=[1", r"override 'seed=\[1' has a value that is not valid YAML"),
        ("seed=!!python/object/apply:os.system [ls]", r"not valid YAML"),
        ("method.steps.3=1", r"indexed by 0 to 2"),
        ("method.steps.x=1", r"indexed by 0 to 2"),
        ("method.steps.3.y=1", r"no keys"),
        ("method.steps.-1=1", r"indexed by 0 to 2"),
        ("method.steps.²=1", r"indexed by 0 to 2"),
        (".seed=1", r"unknown|form"),
        ("training..ema=1", r"unknown|form"),
    ],
)
def test_overrides_that_make_no_sense(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        distill(tmp_path, override)


# unknown keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("sed=1", "sed", "seed"),
        ("modle.layers=1", "modle", "model"),
        ("model.chanels=[8]", "model.chanels", "channels"),
        ("schedule.num_timesteps=10", "schedule.num_timesteps", "num_train_timesteps"),
        ("denoising.lerning_rate=1", "denoising.lerning_rate", "learning_rate"),
        ("training.batchsize=1", "training.batchsize", "batch_size"),
        ("evaluation.teacher_step=[4]", "evaluation.teacher_step", "teacher_steps"),
        ("data.sise=4", "data.sise", "size"),
        ("data.labeled=false", "data.labeled", "labelled"),
    ],
)
def test_an_unknown_key_of_training_names_the_nearest(tmp_path, override, key, near):
    with pytest.raises(UserError, match=rf"^config key {key} is unknown; did you mean {near}\?$"):
        train(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("teacher.pth=x", "teacher.pth", "path"),
        ("teacher.null_lable=1", "teacher.null_lable", "null_label"),
        ("method.stepz=[1]", "method.stepz", "steps"),
        ("method.guidence=2", "method.guidence", "guidance"),
        ("metod=1", "metod", "method"),
        ("data={kind: datasets, path: x, size: 8, spilt: test}", "data.spilt", "split"),
        ("data={kind: folder, path: x, size: 8, upscael: true}", "data.upscael", "upscale"),
    ],
)
def test_an_unknown_key_of_distilling_names_the_nearest(tmp_path, override, key, near):
    with pytest.raises(UserError, match=rf"^config key {key} is unknown; did you mean {near}\?$"):
        distill(tmp_path, override)


def test_where_no_key_is_near_the_known_ones_are_listed(tmp_path):
    with pytest.raises(UserError, match=r"data\.size is unknown; known here are kind$"):
        distill(tmp_path, "data.size=8")
    with pytest.raises(
        UserError,
        match=r"teacher\.zzz is unknown; known here are variant, scheduler, guidance_kind, path, train, "
        "null_label, guidance$",
    ):
        distill(tmp_path, "teacher.zzz=8")


def test_the_keys_of_other_kinds_are_not_proposed(tmp_path):
    """`split` is a key of data sets, not of folders."""
    with pytest.raises(UserError) as error:
        train(tmp_path, "data.split=test")
    assert "subset" not in str(error.value) and "mean split" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.batch_size=0", "training.batch_size is 0"),
        ("training.ema=1", "training.ema is 1"),
        ("data.size=-3", "data.size is -3"),
        ("data.channels=2", "data.channels is 2"),
        ("model.channels=[a]", "model.channels.0 is 'a'"),
        ("schedule.beta_schedule=cosine", "schedule.beta_schedule is 'cosine'"),
        ("prediction=flow", "prediction is 'flow'"),
        ("evaluation.samples=1", "evaluation.samples is 1"),
        ("seed=-1", "seed is -1"),
        ("denoising.weight=snrr", "denoising.weight is 'snrr'"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(tmp_path, override, key):
    with pytest.raises(UserError, match=rf"^config key {key}: \S+"):
        train(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("method.alpha=1.5", "method.alpha is 1.5"),
        ("method.steps=[]", "method.steps is \\[\\]"),
        ("method.steps=[2, x]", "method.steps.1 is 'x'"),
        ("method.updates=0", "method.updates is 0"),
        ("method.updates=many", "method.updates is 'many'"),
        ("method.learning_rate=0", "method.learning_rate is 0"),
        ("method.learning_rate=[1, x, 1]", "method.learning_rate.* is .*x.*"),
        ("method.sampler=euler", "method.sampler is 'euler'"),
    ],
)
def test_a_value_of_a_method_is_named_with_its_key(tmp_path, override, key):
    with pytest.raises(UserError, match=rf"^config key {key}: \S+"):
        distill(tmp_path, override)


def test_data_without_a_kind_lists_the_kinds(tmp_path):
    for data in ("{}", "{path: x}", "{kind: foldr}", "digits"):
        with pytest.raises(UserError, match=r"data.*digits.*folder.*datasets"):
            distill(tmp_path, f"data={data}")


def test_a_teacher_is_one_of_two(tmp_path):
    for teacher in ("{}", "{path: x, train: y.yaml}"):
        with pytest.raises(UserError, match="teacher needs either path"):
            distill(tmp_path, f"teacher={teacher}")


# methods --------------------------------------------------------------------------------------------------


def test_methods_by_name_and_default(tmp_path):
    assert type(distill(tmp_path).method[0]) is Progressive
    assert type(distill(tmp_path, "method={steps: [2]}").method[0]) is Progressive
    both = distill(tmp_path, "method=[{steps: [2]}, {name: denoising, updates: 3}]").method
    assert [type(m) for m in both] == [Progressive, Denoising]


@pytest.mark.parametrize(
    "name", ["progresive", "", ".x", "..x", "os.path", "diffkd.methods.base", "no_such.module", "3"]
)
def test_an_unknown_method_is_named(tmp_path, name):
    with pytest.raises(UserError, match="method") as error:
        distill(tmp_path, f"method.name='{name}'")
    assert repr(name) in str(error.value) or name in str(error.value)


@pytest.mark.parametrize("method", ["progressive", "null", "3", "[]", "[3]"])
def test_a_method_of_another_shape_is_refused(tmp_path, method):
    with pytest.raises(UserError, match="method"):
        distill(tmp_path, f"method={method}")


def test_a_method_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "mine.py").write_text(
        "from diffkd.methods.base import Method, Stage\n"
        "class Mine(Method):\n"
        "    reference = 'none'\n"
        "    strength: float = 1.0\n"
        "    def stages(self, start): return [Stage('mine', 1, 1e-3)]\n"
        "    def losses(self, nets, batch, step, rng): yield from ()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    content = distill(tmp_path, "method={name: my_lab.mine, strength: 0.5}")
    once = resolved(content)
    assert once["method"] == [{"name": "my_lab.mine", "strength": 0.5}]
    assert resolved(load(written(tmp_path, once), Distill)) == once
    with pytest.raises(UserError, match=r"method\.strenght is unknown; did you mean strength\?"):
        distill(tmp_path, "method={name: my_lab.mine, strenght: 0.5}")


# the objects ----------------------------------------------------------------------------------------------


def strict_classes() -> list[type[Strict]]:
    for module in pkgutil.walk_packages(diffkd.__path__, "diffkd."):
        importlib.import_module(module.name)
    found, waiting = set(), [Strict]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            if kind not in found and kind.__module__.startswith("diffkd."):
                found.add(kind)
                waiting.append(kind)
    return sorted(found, key=lambda k: k.__qualname__)


def is_nested(annotation: Any) -> bool:
    if isinstance(annotation, type):
        return issubclass(annotation, Strict)
    return any(is_nested(inner) for inner in get_args(annotation))


def test_all_config_classes_are_seen():
    data = {Digits, Folder, HubDataset}
    assert {Train, Distill, DistillClassifier, Progressive, config.Teacher, *data} <= set(strict_classes())


@pytest.mark.parametrize("kind", strict_classes(), ids=lambda k: k.__name__)
def test_every_field_has_a_line_of_help(kind):
    bare = []
    for name, field in kind.model_fields.items():
        tag = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        if not field.description and not is_nested(field.annotation) and not tag:
            bare.append(name)
    assert bare == []


def words(annotation: Any) -> set[str]:
    """The values that a field may be given by name."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return {value for value in inner if isinstance(value, str)}
    return set().union(*(words(one) for one in inner))


@pytest.mark.parametrize("kind", strict_classes(), ids=lambda k: k.__name__)
def test_every_choice_can_be_written_in_yaml_as_it_is_called(kind):
    """`precision: no` would be read as false."""
    for field in kind.model_fields.values():
        for word in words(field.annotation):
            assert yaml.safe_load(f"key: {word}") == {"key": word}


@pytest.mark.parametrize("kind", strict_classes(), ids=lambda k: k.__name__)
def test_every_class_refuses_unknown_keys_and_does_not_change(kind):
    assert kind.model_config["extra"] == "forbid" and kind.model_config["frozen"]


def test_a_config_does_not_change_once_read(tmp_path):
    content = train(tmp_path)
    with pytest.raises(pydantic.ValidationError):
        content.seed = 1
    with pytest.raises(pydantic.ValidationError):
        content.training.ema = 0.1
