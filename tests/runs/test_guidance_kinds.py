"""Kinds of guidance in runs and commands: what is drawn and recorded, what is baked in, what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import diffkd
from diffkd.core.guidance_kinds import set_kind
from diffkd.methods.output import Output
from diffkd.metrics.evaluation import comparison
from diffkd.models import loading, saving, sizes
from diffkd.models.students import copy_of
from diffkd.runs.benchmark_config import Benchmark
from diffkd.runs.reports import model_card
from diffkd.training import state
from diffkd.training.config import Training
from tests import dit
from tests.refusals import refuse
from tests.runs.tiny import CONFIG, OF_LATENTS, TEACHER, UNMEASURED, network, write

KIND = {"interval": [0.28, 5.42], "rescale": 0.7, "worse": "worse"}
AS_OPTIONS = ("--guidance-interval", 0.28, 5.42, "--guidance-rescale", 0.7, "--worse", "worse")
DRAWN = ("-n", 6, "--steps", 4, "-w", 3)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A teacher of classes, a smaller one beside it with the same autoencoder, images, and a run."""
    work = tmp_path_factory.mktemp("guided")
    dit.teacher_and_images(work)
    shutil.copytree(work / "teacher", work / "worse")
    small = dit.network(classes=3, num_layers=1)
    torch.manual_seed(1)
    for parameter in small.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    shutil.rmtree(work / "worse" / "transformer")
    small.save_pretrained(work / "worse" / "transformer", safe_serialization=True)
    (work / "run.yaml").write_text(yaml.safe_dump({**OF_LATENTS, "pictures": 0}))
    return work


@pytest.fixture
def here(work, tmp_path, monkeypatch):
    for name in ("teacher", "images"):
        (tmp_path / name).symlink_to(work / name)
    shutil.copytree(work / "worse", tmp_path / "worse")
    shutil.copy(work / "run.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def teacher_as(kind):
    return f"teacher={json.dumps({'path': 'teacher', 'guidance_kind': kind})}"


def break_up(folder):
    """Other weights at the same place."""
    (path,) = (folder / "transformer").glob("*.safetensors")
    save_file({key: 1.01 * value for key, value in load_file(path).items()}, path)


# drawing


def test_sample_draws_what_python_does_and_resumes_no_other_kind(cli, here):
    given = ("sample", "teacher", *DRAWN, *AS_OPTIONS, "--out", "out.npz")
    code, out, err = cli(*given)
    assert (code, err) == (0, "") and "6 images in 4 steps (nfe 6)" in out  # guided in the last two
    teacher = diffkd.load("teacher")
    diffkd.guidance.set_kind(teacher, interval=(0.28, 5.42), rescale=0.7, worse=diffkd.load("worse"))
    (ours,) = diffkd.generate(teacher, 6, steps=4, guidance=3.0)
    drawn = np.load("out.npz")["arr_0"]
    assert np.array_equal(ours.numpy(), drawn)
    set_kind(teacher)
    (plain,) = diffkd.generate(teacher, 6, steps=4, guidance=3.0)
    assert np.abs(plain.numpy().astype(int) - drawn).max() > 2
    assert "all 6 images exist already" in cli(*given)[1]
    for others in ((), AS_OPTIONS[:3], AS_OPTIONS[3:], (*AS_OPTIONS[:3], "--guidance-rescale", 0.5)):
        refuse(cli, here, "sample", "teacher", *DRAWN, *others, "--out", "out.npz", says="guidance_kind")
    break_up(here / "worse")
    refuse(cli, here, *given, says=["guidance_kind", "--overwrite"])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("-w", 1, *AS_OPTIONS[:3]), "does nothing with weight 1; give a --guidance other than 1, or leave"),
        (AS_OPTIONS[:3], "does nothing with weight 1"),
        (("-w", 2, "--guidance-interval", 5, 0.2), "guidance interval 5 to 0.2 is no range of noise levels"),
        (("-w", 2, "--guidance-rescale", 2), "--guidance-rescale"),
        (("-w", 2, "--guidance-rescale", 0), "is an interval, a rescale above 0 or a worse model"),
        (("-w", 2, "--worse", "nowhere"), "nowhere"),
        (("-w", 2, "--worse", "pixels"), "pixels makes 1x8x8, and teacher makes latents of 4x8x8"),
        (("-w", 2, "--worse", "elsewhere"), "elsewhere works in the latents of other encoders than teacher"),
    ],
)
def test_what_sample_refuses(cli, here, make_pipeline, asked, says):
    make_pipeline(here, name="pixels")
    vae = dit.autoencoder(scaling_factor=0.5)
    dit.pipeline(classes=3, prediction="v_prediction", vae=vae).save_pretrained(here / "elsewhere")
    refuse(cli, here, "sample", "teacher", "-n", 2, "--steps", 2, "--out", "out", *asked, says=says)


def test_students_are_guided_in_no_kind(cli, here):
    """Those that have guidance baked in: what to do is said."""
    student = diffkd.load("teacher")
    student.steps = 2
    saving.save(student, here / "student")
    model_card.write(here / "student", model_card.describe(student, guidance_baked_in=3.0))
    says = ["student has guidance 3 baked in", "take the model that it was distilled from"]
    refuse(cli, here, "sample", "student", "-n", 2, "-w", 2, *AS_OPTIONS[:3], "--out", "out", says=says)
    refuse(
        cli, here, "sample", "teacher", "--steps", 2, "-n", 2, "-w", 2, "--worse", "student", "--out", "out",
        says="student is a student of 2 steps, which knows no other noise levels",
    )  # fmt: skip


# measuring


def test_a_record_says_it_and_is_measured_again_from_that(cli, here):
    measured = ("evaluate", "teacher", "--reference", "images", "--features", "shapes", "--samples", 6)
    given = (*measured, "--steps", 2, "-w", 3, *AS_OPTIONS)
    code, _, err = cli(*given, "--out", "record.json")
    assert code == 0, err
    record = json.loads((here / "record.json").read_text())
    kind = record["protocol"]["guidance_kind"]
    assert (kind["interval"], kind["rescale"], kind["worse"]["path"]) == (
        [0.28, 5.42],
        0.7,
        str(here / "worse"),
    )
    assert record["nfe"] == 3  # unguided at t = 1
    counts = [sum(p.numel() for p in diffkd.load(name).network.parameters()) for name in ("teacher", "worse")]
    assert record["parameters"] == sum(counts)
    code, out, _ = cli("evaluate", "--repeat", "record.json")
    assert code == 0 and "the same to the last digit" in out
    assert cli(*measured, "--steps", 2, "-w", 3, "--out", "plain.json").code == 0
    plain = json.loads((here / "plain.json").read_text())
    assert "guidance_kind" not in plain["protocol"] and plain["fid"] != record["fid"]
    _, out, _ = cli("compare", "record.json", "plain.json")
    assert "0.28" in "".join(out.split()) and "rescaledby0.7" in "".join(out.split())
    refuse(
        cli, here, *measured, "--steps", 2, "-w", 2, *AS_OPTIONS[:3], "--sampler", "stock",
        says="--sampler stock draws as the pipeline does; leave out --guidance",
    )  # fmt: skip
    for number, option in ((0, "--guidance-interval"), (3, "--guidance-rescale"), (5, "--worse")):
        few = AS_OPTIONS[number : number + (3 if number == 0 else 2)]
        refuse(
            cli,
            here,
            *measured,
            "--steps",
            2,
            *few,
            "-w",
            2,
            "--sampler",
            "stock",
            says="leave out --guidance",
        )
        refuse(cli, here, *measured, "--steps", 2, *few, says="does nothing with weight 1")
        refuse(
            cli, here, "evaluate", "images", "--reference", "images", "--features", "shapes", *few,
            says=f"{option} is for models, and images is a set of images",
        )  # fmt: skip
    break_up(here / "worse")
    refuse(
        cli, here, "evaluate", "--repeat", "record.json", says=["the worse model", "is not what was measured"]
    )


def test_records_that_were_changed(cli, here):
    measured = ("evaluate", "teacher", "--reference", "images", "--features", "shapes", "--samples", 6)
    assert cli(*measured, "--steps", 2, "-w", 3, *AS_OPTIONS[:3], "--out", "record.json").code == 0
    whole = json.loads((here / "record.json").read_text())
    for kind in ({"interval": [1]}, {"interval": "all"}, {"rescale": 7}, {"worse": 3}, []):
        changed = {**whole, "protocol": {**whole["protocol"], "guidance_kind": kind}}
        (here / "record.json").write_text(json.dumps(changed))
        refuse(cli, here, "evaluate", "--repeat", "record.json", says="a record's protocol.guidance_kind")


BENCHMARK = {
    "out": "bench",
    "models": [
        {"path": "teacher", "name": "plain", "steps": [2], "guidance": [2.0]},
        {"path": "teacher", "name": "within", "steps": [2], "guidance": [1.0, 2.0],
         "guidance_kind": {"interval": [0.28, 5.42]}},
    ],
    "teacher": {"path": "teacher", "steps": [4], "guidance": 2.0, "guidance_kind": {"rescale": 0.5}},
    "evaluation": {
        "features": "shapes", "reference": {"kind": "folder", "path": "images", "size": 32},
        "metrics": ["fid", "agreement"], "samples": 6,
    },
}  # fmt: skip


def test_a_benchmark_of_kinds(cli, here):
    (here / "bench.yaml").write_text(yaml.safe_dump(BENCHMARK))
    code, _, err = cli("benchmark", "bench.yaml")
    assert code == 0, err
    found = json.loads((here / "bench" / "metrics.json").read_text())
    rows = {(r["model"], r["protocol"]["guidance"]): r for r in found}
    assert [r["protocol"].get("guidance_kind") for r in rows.values()] == [
        None, None, {"interval": [0.28, 5.42]},
    ]  # fmt: skip
    assert rows["within", 2.0]["nfe"] == 3 and rows["plain", 2.0]["nfe"] == 4
    assert {json.dumps(r["protocol"]["teacher"]["guidance_kind"]) for r in found} == {'{"rescale": 0.5}'}
    one, other = found[0], json.loads(json.dumps(found[1]))
    agreement = {key for key in comparison.comparable(one, other) if key != "fid"}
    assert {"psnr", "feature_distance"} <= agreement
    other["protocol"]["teacher"]["guidance_kind"]["rescale"] = 0.6  # of another teacher's images
    assert {*comparison.comparable(one, other)} == {"fid"}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"guidance": [1.0]}, "does nothing with weight 1"),
        ({"name": "plain", "guidance": [3.0]}, "models name plain twice, with different kinds of guidance"),
        ({"guidance_kind": {}}, "is an interval, a rescale above 0 or a worse model"),
        ({"guidance_kind": {"interval": [3, 1]}}, "guidance interval 3 to 1 is no range"),
    ],
)
def test_benchmarks_that_are_refused(model, says):
    plain, within = BENCHMARK["models"]
    with pytest.raises(ValueError, match=says):
        Benchmark.model_validate({**BENCHMARK, "models": [plain, {**within, **model}]})


# distilling


def test_a_run_bakes_it_in_says_so_and_resumes_no_other(cli, here):
    given = ("distill", "run.yaml", "method.steps=[2]", "method.learning_rate=1e-2")
    outcome = cli(*given, teacher_as(KIND))
    assert outcome.code == 0, outcome.stderr
    assert "guided where sigma / alpha is 0.28 to 5.42, rescaled by 0.7, against " in outcome.stdout
    folder = here / "run" / "students" / "2-steps"
    card = json.loads((folder / "diffkd.json").read_text())
    kind = card["guidance_kind"]
    assert card["guidance_baked_in"] == 3.0 and kind["worse"]["path"] == str(here / "worse")
    assert (kind["interval"], kind["rescale"]) == ([0.28, 5.42], 0.7)
    said = (folder / "README.md").read_text()
    assert "guidance kind | where sigma / alpha is 0&#46;28 to 5&#46;42, rescaled by 0&#46;7" in said
    assert diffkd.load(folder).taught_kind == kind
    assert cli(*given, teacher_as(KIND)).code == 0  # as it is
    for other in (
        {**KIND, "interval": [0.3, 5.42]},
        {**KIND, "rescale": 0.6},
        {"interval": KIND["interval"]},
    ):
        refuse(
            cli,
            here,
            *given,
            teacher_as(other),
            says=["belongs to a run with another config", "guidance_kind"],
        )
    assert cli(*given, "out=plain").code == 0
    one, other = (network(here / out / "students" / "2-steps") for out in ("run", "plain"))
    assert max((one[key] - other[key]).abs().max() for key in one) > 1e-4
    assert "guidance_kind" not in json.loads((here / "plain/students/2-steps/diffkd.json").read_text())
    break_up(here / "worse")
    refuse(cli, here, *given, teacher_as(KIND), says="the teacher of run has changed since the run began")


def test_what_a_students_student_is_said_to_have(cli, here):
    """A stage without guidance keeps what its teacher has baked in; so does a run from a student."""
    given = ("method.steps=[2, 1]", "method.updates=1", teacher_as({"interval": [0.28, 5.42]}))
    assert cli("distill", "run.yaml", *given).code == 0
    one = json.loads((here / "run/students/1-steps/diffkd.json").read_text())
    assert one["guidance_kind"] == {"interval": [0.28, 5.42]} and one["guidance_baked_in"] == 3.0
    again = (
        "out=again", "teacher={path: run/students/2-steps}",
        "method={name: progressive, steps: [1], updates: 1}",
    )  # fmt: skip
    outcome = cli("distill", "run.yaml", *again)
    assert outcome.code == 0, outcome.stderr
    assert json.loads((here / "again/students/1-steps/diffkd.json").read_text())["guidance_kind"] == {
        "interval": [0.28, 5.42]
    }


CHAIN = [
    {"name": "progressive", "steps": [2], "updates": 1, "guidance": 2.0},
    {"name": "output", "updates": 1, "guidance": 2.0},
]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ((teacher_as(KIND), "method.guidance=1"), "does nothing with weight 1; give a method.guidance other"),
        ((teacher_as({**KIND, "worse": "teacher/vae"}),), "teacher/vae"),
        ((teacher_as({"interval": [5, 1]}),), "guidance interval 5 to 1 is no range of noise levels"),
        ((teacher_as({"rescale": 2}),), "guidance rescale 2 is no share"),
        ((teacher_as({"intervals": [1, 5]}),), "did you mean interval?"),
        (
            (teacher_as(KIND), f"method={json.dumps(CHAIN)}"),
            "guides a student before it, and teacher.guidance_kind is of the run's teacher alone; set",
        ),
    ],
)
def test_runs_that_are_refused(cli, here, changes, says):
    refuse(cli, here, "distill", "run.yaml", *changes, says=says)


def test_the_worse_network_runs_in_the_teachers_precision_and_counts(here):
    teacher, worse = diffkd.load("teacher"), diffkd.load("worse")
    alone, its = sizes.denoiser_size(teacher), sizes.denoiser_size(worse)
    set_kind(teacher, worse=worse)
    teacher.requires_grad_(False)
    assert sizes.denoiser_size(teacher) == alone
    both = sizes.drawn_size(teacher)
    assert (both.parameters, both.bytes) == (alone.parameters + its.parameters, alone.bytes + its.bytes)
    assert both.macs == (alone.macs + its.macs) // 2
    pupil = copy_of(teacher).requires_grad_(True)
    stage = Output(guidance=2.0).stages(teacher)[0]
    made = state.prepare(
        Accelerator(cpu=True), {"teacher": teacher, "student": pupil}, stage, Training(precision="bf16")
    )
    assert teacher.worse.dtype == teacher.dtype == torch.bfloat16 and {*made.learners} == {"student"}
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 2])
    found = teacher(x, torch.full((2,), 0.5), guidance=2.0, class_labels=labels)
    assert found.dtype == torch.float32 and found.isfinite().all()


@pytest.mark.slow
def test_two_processes_distil_what_one_does(cli, here, launched):
    given = ("method.steps=[2]", "method.learning_rate=1e-3", "training.micro_batches=2", teacher_as(KIND))
    assert cli("distill", "run.yaml", "out=one", *given).code == 0
    done = launched(2, "distill", "run.yaml", "out=two", *given)
    assert done.returncode == 0, done.stderr
    one, two = (network(here / out / "students" / "2-steps") for out in ("one", "two"))
    a, b = (torch.cat([value.double().flatten() for value in each.values()]) for each in (one, two))
    assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize(
    "kind", [[], {"interval": [1]}, {"interval": [1, "a"]}, {"rescale": "x"}, {"worse": 3}, {"more": 1}]
)
def test_cards_that_were_changed(here, kind):
    student = shutil.copytree(here / "teacher", here / "student")
    (student / "diffkd.json").write_text(json.dumps({"steps": 2, "guidance_kind": kind}))
    with pytest.raises(
        diffkd.errors.UserError, match="guidance_kind .* is no kind of guidance; repair or remove"
    ):
        loading.load(student)


def test_a_teacher_that_is_trained_first(cli, tmp_path, monkeypatch):
    """It is guided within its interval where it is measured; its students have that baked in."""
    monkeypatch.chdir(tmp_path)
    write("teacher.yaml", {**TEACHER, **UNMEASURED})
    kind = {"interval": [0.28, 5.42]}
    method = {"name": "progressive", "steps": [2], "updates": 2, "guidance": 2.0}
    run = {**CONFIG, "method": method, "evaluation": {"samples": 32, "teacher_steps": [4]}, "pictures": 0}
    write("run.yaml", {**run, "teacher": {"train": "teacher.yaml", "guidance_kind": kind}})
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    teacher, pupil = json.loads((tmp_path / "runs/students/metrics.json").read_text())
    assert (teacher["protocol"]["guidance"], teacher["protocol"]["guidance_kind"]) == (2.0, kind)
    assert 4 < teacher["nfe"] < 8 and pupil["nfe"] == 2 and "guidance_kind" not in pupil["protocol"]
    card = json.loads((tmp_path / "runs/students/students/2-steps/diffkd.json").read_text())
    assert card["guidance_kind"] == kind
