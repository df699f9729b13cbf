"""Distilling a classifier: the loss, the split, the folders, the whole job at a tiny size."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from diffkd.core.classifier import Classifier
from diffkd.core.losses import UNLABELLED, knowledge_distillation
from diffkd.core.schedules import Schedule
from diffkd.data import splits
from diffkd.data.digits import Digits
from diffkd.errors import UserError
from diffkd.methods.base import Batch
from diffkd.methods.logits import Logits
from diffkd.models import sizes
from diffkd.runs import config_files
from diffkd.runs.classification import distill, networks
from diffkd.runs.classification.artifacts import count_correct
from diffkd.runs.classification.cnn import CNN
from diffkd.runs.classification.config import DistillClassifier
from diffkd.runs.classification.report import mean_accuracy, table_rows
from diffkd.runs.config import Distill
from diffkd.runs.config_files import load_distill
from tests.refusals import refuse
from tests.runs.test_run_report import Page
from tests.runs.tiny import log, records, same, signal_at

COSINE = Schedule.cosine(64)
CONFIG = {
    "out": "run",
    "repeats": 2,
    "data": {"kind": "digits"},
    "held_out": 97,
    "labelled": 40,
    "teacher": {"model": {"name": "cnn", "arguments": {"channels": [8]}}, "updates": 4},
    "students": {
        "small": {"name": "cnn", "arguments": {"channels": [4, 6]}},
        "tiny": {"name": "cnn", "arguments": {"channels": [2]}},
    },
    "method": {"name": "logits", "alpha": 0.75, "temperature": 3, "updates": 6},
    "sweep": {"student": "tiny", "alpha": [0.5, 0.75], "temperature": [1, 3]},
    "training": {"batch_size": 16, "log_every": 1, "checkpoint_every": 2},
}
JOBS = [
    *(f"teacher-seed-{seed}" for seed in (0, 1)),
    *(f"small-{what}-seed-{seed}" for seed in (0, 1) for what in ("labels", "alpha-0.75-T-3.0")),
    *(f"tiny-{what}-seed-{seed}" for seed in (0, 1) for what in ("labels", "alpha-0.75-T-3.0")),
    *(f"tiny-alpha-{a}-seed-{s}" for a in ("0.5-T-1.0", "0.5-T-3.0", "0.75-T-1.0") for s in (0, 1)),
]
NOISY = ["method.noisy=true", "schedule={num_train_timesteps: 64}"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return tmp_path


# the loss -------------------------------------------------------------------------------------------------


class Seen(Classifier):
    """Keeps its inputs and outputs."""

    def forward(self, x, t=None):
        self.calls = [*getattr(self, "calls", []), (x, t, super().forward(x, t))]
        return self.calls[-1][2]


def nets(*, timed=False):
    torch.manual_seed(0)
    teacher = Seen(CNN(1, 3, [6], timed=False), 3).requires_grad_(False)
    return {
        "teacher": teacher,
        "student": Seen(CNN(1, 3, [4], timed=timed), 3, schedule=COSINE if timed else None),
    }


def batch(labels=(0, 1, 2, UNLABELLED, UNLABELLED)):
    x0 = torch.rand(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(x0, {"class_labels": torch.tensor(labels)})


def loss_of(method, models, given, seed=5):
    rng = torch.Generator().manual_seed(seed)
    [loss] = method.losses(models, given, method.stages(models["student"])[0], rng)
    return loss


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_the_published_one(alpha, direction):
    models, given = nets(), batch()
    method = Logits(alpha=alpha, temperature=2.5, direction=direction)
    loss = loss_of(method, models, given)
    s = models["student"].calls[0][2].detach().double()
    z = models["teacher"](given.x0).double()
    labels = given.cond["class_labels"]
    expected = knowledge_distillation(s, z, labels, alpha=alpha, temperature=2.5, direction=direction)
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.metrics["loss"].mean().item() == pytest.approx(loss.value.item(), rel=1e-6)
    # and in NumPy, from the formula
    p, q = (np.exp(a / 2.5) / np.exp(a / 2.5).sum(1, keepdims=True) for a in (s.numpy(), z.numpy()))
    first, second = (p, q) if direction == "reverse" else (q, p)
    kl = (first * np.log(first / second)).sum(1)
    whole = np.exp(s.numpy()) / np.exp(s.numpy()).sum(1, keepdims=True)
    hard = -np.log(whole[np.arange(3), [0, 1, 2]])  # the first three have a label
    assert loss.value.item() == pytest.approx(
        (1 - alpha) * hard.mean() + alpha * 2.5**2 * kl.mean(), rel=1e-6
    )


def test_without_the_teacher_it_is_not_called():
    models = {"student": nets()["student"]}
    assert loss_of(Logits(alpha=0), models, batch()).value.isfinite()


def test_a_batch_without_a_label_has_the_teachers_part_alone():
    models, given = nets(), batch([UNLABELLED] * 4)
    loss = loss_of(Logits(alpha=0.5, temperature=2), models, given)
    other = loss_of(Logits(alpha=1.0, temperature=2), models, given)
    assert loss.value.item() == pytest.approx(0.5 * other.value.item(), rel=1e-6)
    assert loss_of(Logits(alpha=0), models, given).value.item() == 0


def test_a_noisy_student_is_given_noise_and_its_teacher_is_not():
    models, given = nets(timed=True), batch()
    loss = loss_of(Logits(noisy=True), models, given)
    x_t, t, _ = models["student"].calls[0]
    [(clean, none, _)] = models["teacher"].calls
    assert torch.equal(clean, given.x0) and none is None
    rng = torch.Generator().manual_seed(5)
    expected = torch.randint(1, 65, (5,), generator=rng).double() / 64
    assert torch.equal(t, expected) and torch.equal(loss.metrics["t"], t)
    alpha, sigma = COSINE.at(t, like=given.x0)
    assert torch.allclose(x_t, alpha * given.x0 + sigma * torch.randn(given.x0.shape, generator=rng))


# folders --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder, the classifier in it, and what it is made of."""
    torch.manual_seed(1)
    network = networks.Network(arguments={"channels": [4, 8]})
    classifier = Classifier(
        network.build((2, 6, 5), 3, timed=True), 3, shape=(2, 6, 5), schedule=COSINE
    ).eval()
    (tmp_path / "saved").mkdir()
    networks.save(classifier, network, tmp_path / "saved", record={"accuracy": 0.5, "role": "labels"})
    return tmp_path / "saved", classifier


def test_a_folder_opens_as_what_was_saved(saved):
    folder, classifier = saved
    again = networks.load(folder)
    x, t = torch.randn(4, 2, 6, 5), torch.full((4,), 0.25, dtype=torch.float64)
    assert torch.equal(again(x, t), classifier(x, t)) and not again.training
    assert (again.num_classes, again.shape) == (3, (2, 6, 5))
    assert torch.equal(again.schedule.alphas_cumprod, COSINE.alphas_cumprod)
    text = (folder / "README.md").read_text()
    assert "classifiers.load" in text and "classifier(x_t, t)" in text and "| role | labels |" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "pipeline"}, "does not describe a classifier"),
        ({"network": {"name": "os.system", "arguments": {}}}, "is not allowed to run"),
        ({"network": {"name": "cnn", "arguments": {"channels": [4, 9]}}}, "parameters and the weights are"),
        (
            {"network": {"name": "cnn", "arguments": {"channels": [1 << 14] * 12}}},
            "parameters and the weights",
        ),
        ({"network": {"name": "cnn", "arguments": {"chanels": [4]}}}, "did you mean channels"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"shape": [2, 6]}, "shape"),
        ({"schedule": {"num_train_timesteps": 10**9}}, "num_train_timesteps 1000000000"),
        ({"schedule": {"beta_schedule": "none"}}, "schedule that cannot be built"),
    ],
)
def test_a_folder_of_anybodys_making(saved, change, says):
    folder, _ = saved
    path = folder / "diffkd.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=says):
        networks.load(folder)


def test_weights_that_do_not_fit(saved):
    folder, _ = saved
    weights = load_file(folder / "model.safetensors")
    torn = (folder / "model.safetensors").read_bytes()[:-9]
    save_file({**weights, "classify.bias": torch.full((3,), float("nan"))}, folder / "model.safetensors")
    with pytest.raises(UserError, match="not all finite numbers"):
        networks.load(folder)
    save_file({f"x.{key}": value for key, value in weights.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        networks.load(folder)
    (folder / "model.safetensors").write_bytes(torn)
    with pytest.raises(UserError, match="is it complete|cannot be loaded"):
        networks.load(folder)
    with pytest.raises(UserError, match="is not a classifier's folder"):
        networks.load(folder.parent)


class Linear(nn.Module):
    """Of the user's own, as it were."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inner = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.inner(x.flatten(1))


def test_a_network_of_ones_own(tmp_path):
    network = networks.Network(name=f"{__name__}.Linear", arguments={"inputs": 4, "outputs": 3})
    classifier = Classifier(network.build((1, 2, 2), 3), 3, shape=(1, 2, 2))
    networks.save(classifier, network, tmp_path)
    with pytest.raises(UserError, match="code that a folder is not allowed to run"):
        networks.load(tmp_path)
    again = networks.load(tmp_path, Linear(4, 3))
    x = torch.randn(5, 1, 2, 2)
    assert torch.equal(again(x), classifier(x))
    with pytest.raises(UserError, match="cannot be loaded"):
        networks.load(tmp_path, Linear(4, 2))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "resnet"}, "network 'resnet' is unknown; use cnn"),
        ({"name": "cnn", "arguments": {"channel": [4]}}, "channel is unknown; did you mean channels"),
        ({"name": "cnn", "arguments": {"channels": [0]}}, "channels.0 is 0"),
        ({"name": "cnn"}, "channels is missing"),
        ({"name": f"{__name__}.Nothing"}, "is unknown: .* has no Nothing; it has .*Linear"),
        ({"name": f"{__name__}.Linear", "arguments": {"x": 1}}, "cannot be made: TypeError: .*'x'"),
        ({"name": "json.dumps", "arguments": {"obj": 1}}, "makes a str; it must make an nn.Module"),
        ({"name": f"{__name__}.Linear", "arguments": {"inputs": 5, "outputs": 3}}, "does not take images"),
        ({"name": f"{__name__}.Linear", "arguments": {"inputs": 4, "outputs": 2}}, "gives 2 logits"),
    ],
)
def test_a_network_that_cannot_be_built(given, says):
    with pytest.raises(UserError, match=says):
        networks.Network(**given).build((1, 2, 2), 3)


def test_the_cnn_takes_any_image():
    for shape, channels in (((3, 7, 5), [3, 5]), ((1, 1, 1), [8, 16, 4]), ((4, 32, 32), [16])):
        for timed in (False, True):
            network = CNN(shape[0], 6, channels, timed=timed)
            given = (torch.zeros(2, *shape), *((torch.tensor([3.0, 60.0]),) if timed else ()))
            logits = network(*given)
            assert logits.shape == (2, 6) and logits.isfinite().all()
            assert not timed or not torch.equal(logits[0], logits[1])
            assert not list(network.buffers())


# the job --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def classifiers(built_once):
    """A finished run of CONFIG, "run", and what it printed, "stdout"."""

    def build(folder):
        (folder / "c.yaml").write_text(yaml.safe_dump({**CONFIG, "out": str(folder / "run")}))
        with (folder / "stdout").open("w") as stream:
            distill.distill(load_distill(folder / "c.yaml"), Console(file=stream, width=200))

    return built_once("classifiers", build)


@pytest.fixture
def run(here, classifiers):
    """A copy of that run, which `diffkd distill c.yaml` resumes."""
    return shutil.copytree(classifiers / "run", here / "run")


def weights_of(folder):
    return {path.parent.name: load_file(path) for path in sorted(folder.rglob("model.safetensors"))}


def records_but_for_time(folder):
    return [{k: v for k, v in r.items() if k != "milliseconds"} for r in records(folder)]


def test_teachers_students_table_curve_and_page(run, cli, classifiers):
    measured = records(run)
    assert [r["name"] for r in measured] == JOBS
    images = Digits(kind="digits").load()
    held, rest = splits.hold_out(images, 97, 0)
    for record in measured:
        folder = run / ("teachers" if record["role"] == "teacher" else "students") / record["name"]
        classifier = networks.load(folder)
        assert count_correct(classifier, held) == record["correct"] == round(97 * record["accuracy"])
        size = sizes.network_size(classifier.network, torch.zeros(1, 1, 8, 8))
        assert size[:2] == (record["parameters"], record["macs"])
        assert record["milliseconds"] > 0
        card = json.loads((folder / "diffkd.json").read_text())
        assert card["record"] == record and card["classes"] == [str(d) for d in range(10)]
    # by hand: the mean and the sample's standard deviation of two, the size of a CNN of two convolutions
    alone = [100 * r["accuracy"] for r in measured if r["name"].startswith("small-labels")]
    taught = [100 * r["accuracy"] for r in measured if r["name"].startswith("small-alpha")]
    rows = [line.strip("| ").split(" | ") for line in (run / "classifier.md").read_text().splitlines()[2:7]]
    assert [row[0].replace("&#44;", ",") for row in rows] == [
        "teacher", "small, labels alone", "small, distilled", "tiny, labels alone", "tiny, distilled",
    ]  # fmt: skip
    for row, (a, b) in zip(rows[1:3], (alone, taught), strict=True):
        assert row[4] == f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}"
    tiny = (9 * 2 + 2) + (9 * 2 * 2 + 2) + 2 * 2 * 2 + (2 * 10 + 10)
    assert rows[3][1] == str(tiny) and rows[3][2] == "3.48 k"  # 64 (9 * 2 + 9 * 4) + 20
    printed = (classifiers / "stdout").read_text()
    assert all(cell in printed for row in rows for cell in row[1:])
    page = Page(run / "report.html")
    assert [row[1:] for row in page.tables[0][1:]] == [row[1:] for row in rows]
    assert "<svg" in page.source and "labels alone" in page.source
    assert not [name for _, given in page.tags for name in given if name in ("src", "href")]
    assert (run / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # the same command again does nothing anew
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, _, err = cli("distill", "c.yaml")
    assert (code, err) == (0, "")
    changed = {p.name for p, content in before.items() if content != p.read_bytes()}
    assert changed <= {"config.yaml", "report.html"}  # which name the folder that this is a copy of


def test_a_student_starts_alike_and_sees_what_it_may(here):
    settings = load_distill(here / "c.yaml")
    data = distill.TrainingData(settings, *splits.hold_out(settings.data.load(), 97, 0))
    jobs = {job.name: job for job in distill.training_jobs(data)}
    assert list(jobs) == JOBS
    names = "tiny-labels-seed-1", "tiny-alpha-0.5-T-3.0-seed-1", "tiny-labels-seed-0", "teacher-seed-1"
    alone, taught, other, teacher = map(jobs.get, names)
    states = [data.untrained(job).network.state_dict() for job in (alone, taught, other)]
    assert same(states[0], states[1]) and not same(states[0], states[2])
    assert (alone.method.alpha, taught.method.alpha, taught.method.temperature) == (0, 0.5, 3)
    assert alone.method.updates == taught.method.updates == 6 and teacher.method.updates == 4
    images = [data.images(job) for job in (alone, taught, teacher)]
    assert [len(part) for part in images] == [40, 1700, 1700]
    assert [(part.labels != UNLABELLED).sum().item() for part in images] == [40, 40, 1700]


def test_a_stopped_run_ends_with_the_same_bits(here, cli, monkeypatch, classifiers):
    with monkeypatch.context() as patch:
        signal_at(patch, "small-alpha-0.75-T-3.0-seed-0", 3, send=[signal.SIGTERM])
        code, _, err = cli("distill", "c.yaml")
    assert code == 130 and err.startswith("diffkd: interrupted; a checkpoint is saved"), err
    assert not (here / "run/students/tiny-labels-seed-0").exists()
    assert cli("distill", "c.yaml").code == 0
    one, two = weights_of(classifiers / "run"), weights_of(here / "run")
    assert one.keys() == two.keys() == set(JOBS)
    assert all(same(one[name], two[name]) for name in one)
    assert records_but_for_time(classifiers / "run") == records_but_for_time(here / "run")


def test_a_run_that_ended_between_a_folder_and_its_record(run, cli):
    """An exported classifier's record is taken from its folder; it is not trained again."""
    measured = records(run)
    (run / "metrics.json").write_text(json.dumps(measured[:2]))
    log = (run / "log.jsonl").read_text()
    assert cli("distill", "c.yaml").code == 0
    assert records(run) == measured and (run / "log.jsonl").read_text() == log


def test_a_noisy_run_and_a_saved_teacher(run, here, cli):
    """Students for guidance, from the teacher of another run, which is measured once."""
    teacher = "teacher={weights: run/teachers/teacher-seed-0}"
    code, out, err = cli("distill", "c.yaml", "sweep=null", "out=noisy", teacher, *NOISY)
    assert (code, err) == (0, "")
    measured = records(here / "noisy")
    assert [r["name"] for r in measured][:2] == ["teacher", "small-labels-seed-0"] and len(measured) == 1 + 8
    assert measured[0]["accuracy"] == records(run)[0]["accuracy"]
    assert "at the lowest noise of the schedule" in out
    student = networks.load(here / "noisy/students/tiny-alpha-0.75-T-3.0-seed-1")
    assert student.schedule.num_train_timesteps == 64
    assert all(len(record["loss_by_noise"]) == 5 for record in log(here / "noisy"))
    refuse(cli, here, "distill", "c.yaml", "out=x", "sweep=null", *NOISY,
           "teacher={weights: noisy/students/tiny-labels-seed-0}", says="takes noised images")  # fmt: skip


@pytest.mark.slow
def test_two_processes_are_two_micro_batches(here, cli, launched):
    overrides = ["sweep=null", "repeats=1", "training.micro_batches=2"]
    assert cli("distill", "c.yaml", *overrides, "out=one").code == 0
    done = launched(2, "distill", "c.yaml", *overrides, "out=two")
    assert done.returncode == 0, done.stderr
    assert json.loads((here / "two/environment.json").read_text())["processes"] == 2
    one, two = weights_of(here / "one"), weights_of(here / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert max((one[name][key] - two[name][key]).abs().max() for key in one[name]) < 1e-5
    accuracies = [[r["accuracy"] for r in records(here / name)] for name in ("one", "two")]
    assert accuracies[0] == accuracies[1]


def test_without_matplotlib_there_is_a_line_instead_of_pictures(run, cli, monkeypatch):
    for name in ("report.html", "sweep.png", "classifier.md"):
        (run / name).unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = cli("distill", "c.yaml")
    assert code == 0 and "it needs matplotlib (pip install matplotlib)" in out
    assert (run / "classifier.md").exists()
    assert not (run / "report.html").exists() and not (run / "sweep.png").exists()


def test_the_table_of_one_seed_has_no_spread():
    assert str(mean_accuracy([{"accuracy": 0.5}])) == "50.00"
    assert str(mean_accuracy([{"accuracy": 0.5}, {"accuracy": 0.6}])) == "55.00 ± 7.07"


def test_the_table_leaves_out_what_the_sweep_added(here):
    settings = load_distill(here / "c.yaml")
    of = {"parameters": 1, "macs": 1, "milliseconds": 1.0, "accuracy": 0.5}
    method = {"name": "logits", **settings.method.model_dump(mode="json")}
    records = [
        {"model": "tiny", "role": "distilled", "method": method, **of},
        {"model": "tiny", "role": "distilled", "method": {**method, "alpha": 0.5}, **of, "accuracy": 0.9},
    ]
    assert table_rows(settings, records) == [["tiny, distilled", "1", "1", "1.00", "50.00"]]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method.alpha=1.5"], "method.alpha is 1.5"),
        (["method.alpha=-0.1"], "method.alpha is -0.1"),
        (["method.alpha=0"], "method.alpha is 0, which is the student on labels alone"),
        (["method.temperature=0"], "method.temperature is 0"),
        (["method.temperature=.inf"], "method.temperature is inf"),
        (["method.direction=both"], "method.direction is 'both'"),
        (["labelled=9"], "labelled 9 is out of range; .* use 10 to 1700"),
        (["labelled=1701"], "labelled 1701 is out of range"),
        (["held_out=1790"], "held_out 1790 of 1797 images in 10 classes"),
        (["held_out=5"], "held_out 5 of 1797"),
        (["students.tiny.name=resnet"], "network 'resnet' is unknown"),
        (["students.tiny.arguments={}"], "channels is missing"),
        (["students.tiny.nam=cnn"], r"students\.tiny\.nam is unknown; did you mean name"),
        (["students.a/b={}"], "students.a/b"),
        (["students={}"], "students is {}"),
        (["teacher.model={name: cnn}"], "channels is missing"),
        (["teacher={}"], "teacher needs either model"),
        (["teacher={weights: nowhere}"], "nowhere is not a classifier's folder"),
        (
            ["sweep.student=huge"],
            "sweep.student is 'huge', which is not one of the students; use one of small, tiny",
        ),
        (["sweep.alpha=[0]"], r"sweep\.alpha\.0 is 0"),
        (["sweep.temperature=[]"], r"sweep\.temperature"),
        (["method.noisy=true"], "set method.noisy: true and schedule"),
        (["schedule={}"], "set method.noisy: true and schedule"),
        (["method=[{name: logits}, {name: logits}]"], "the config lists several"),
        (["method=[{name: progressive, steps: [2]}, {name: logits}]"], "the config lists several"),
        (["evaluation={}"], "evaluation is unknown"),
        (["method={name: progressive, steps: [2]}"], "config key"),
    ],
)
def test_what_is_refused(here, cli, overrides, says):
    line = refuse(cli, here, "distill", "c.yaml", *overrides)
    assert re.search(says, line), line


def test_a_method_of_the_other_kind_is_refused(here, tmp_path):
    content = {**CONFIG, "method": {"name": "progressive", "steps": [2]}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(
        UserError, match="method progressive distils a denoiser, .* distils a classifier; use one of"
    ):
        config_files.load(tmp_path / "p.yaml", DistillClassifier)
    content = {"out": "x", "teacher": {"path": "t"}, "data": {"kind": "digits"}, "method": {"name": "logits"}}
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="logits distils a classifier, and this run distils a denoiser"):
        config_files.load(tmp_path / "d.yaml", Distill)


def test_data_without_labels_and_a_teacher_of_other_classes(here, cli, image_folder):
    plain = image_folder(here, name="plain", count=30)
    given = f"data={{kind: folder, path: {plain}, size: 8, channels: 1}}"
    refuse(cli, here, "distill", "c.yaml", given, "held_out=4", says="has no labels")
    labelled = image_folder(here, name="labelled", classes=["a", "b"], count=30)
    network = networks.Network(arguments={"channels": [4]})
    (here / "old").mkdir()
    networks.save(Classifier(network.build((1, 8, 8), 3), 3, shape=(1, 8, 8)), network, here / "old")
    given = f"data={{kind: folder, path: {labelled}, size: 8, channels: 1}}"
    refuse(
        cli, here, "distill", "c.yaml", given, "held_out=4", "labelled=4", "teacher={weights: old}",
        says="old has 3 classes and images of (1, 8, 8), and the students have 2",
    )  # fmt: skip


def test_help_says_that_there_are_both_kinds(cli):
    assert "classifier" in cli("distill", "--help").stdout
