"""A run whose stage says that its student is drawn by renoise: from the config to the stock pipeline."""

import json

import yaml

import diffkd


def test_a_renoise_student_is_trained_measured_saved_and_sampled(tmp_path, monkeypatch, make_pipeline, cli):
    monkeypatch.chdir(tmp_path)
    config = {
        "out": "run", "teacher": {"path": str(make_pipeline(tmp_path))}, "data": {"kind": "digits"},
        "method": {"name": "tests.two_networks", "updates": 3}, "training": {"batch_size": 8}, "pictures": 4,
        "evaluation": {"samples": 8, "teacher_steps": [8, 4]},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert cli("distill", "run.yaml").code == 0
    student = tmp_path / "run/students/4-steps"
    index = json.loads((student / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"][1]) == ("DDPMPipeline", "LCMScheduler")
    assert json.loads((student / "diffkd.json").read_text())["sampler"] == "renoise"
    assert diffkd.load(student).sampler == "renoise"
    samplers = {
        (r["role"], r["steps"]): r["protocol"]["sampler"]
        for r in json.loads((tmp_path / "run/metrics.json").read_text())
    }
    assert samplers == {("teacher", 8): "ddim", ("teacher", 4): "ddim", ("student", 4): "renoise"}
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all("judge_learning_rate" in record and "judge_loss" in record for record in records)

    # its own sampler is the default, and the stock code draws the same
    fid = {}
    for sampler in ("renoise", "stock", None):
        options = [] if sampler is None else ["--sampler", sampler]
        args = [student, "--reference", "digits", "--samples", 8, "--steps", 4, "--out", f"{sampler}.json"]
        assert cli("evaluate", *args, *options).code == 0
        record = json.loads((tmp_path / f"{sampler}.json").read_text())
        assert record["protocol"]["sampler"] == (sampler or "renoise")
        fid[sampler] = record["fid"]
    assert fid["renoise"] == fid["stock"] == fid[None]


def test_as_many_steps_as_time_steps_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, make_pipeline, cli
):
    monkeypatch.chdir(tmp_path)
    teacher = make_pipeline(tmp_path, scheduler={"num_train_timesteps": 4, "beta_schedule": "linear"})
    config = {
        "out": "run", "teacher": {"path": str(teacher)}, "data": {"kind": "digits"},
        "method": {"name": "tests.two_networks"}, "evaluation": None,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    code, _, err = cli("distill", "run.yaml")
    assert code == 2 and "4 steps drawn by renoise does not fit" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
