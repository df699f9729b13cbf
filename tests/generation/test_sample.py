"""What `diffkd sample` and `diffkd.generate` draw and print; test_writer.py tests the files."""

import json
import re

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffkd
from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.generation.generator import generate
from tests.refusals import refuse, tree

TRAILING = {"num_train_timesteps": 1000, "beta_schedule": "linear", "timestep_spacing": "trailing"}


@pytest.fixture
def here(tmp_path, monkeypatch, make_pipeline):
    """The working directory: plain and labelled (5 classes), both of three channels."""
    make_pipeline(tmp_path, name="plain", channels=3)
    make_pipeline(tmp_path, name="labelled", channels=3, classes=5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(folder):
    """(N, H, W, C) of the image files of a folder, in order."""
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".webp"))
    return np.stack([np.asarray(Image.open(p)) for p in paths])


def images(denoiser, n, **options):
    return np.concatenate([batch.numpy() for batch in generate(denoiser, n, **options)])


def edit_card(folder, **content):
    path = folder / "diffkd.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **content}))


# which image ----------------------------------------------------------------------------------------------


class Echo(torch.nn.Module):
    """x0 is a function of the state: the last image depends on every number drawn for it."""

    def forward(self, x, time, class_labels=None):
        return torch.sin(x)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_noise_depends_on_seed_and_index_exactly(monkeypatch, sampler, batch_size):
    """Each image's own generator gives its first state and the fresh noise of its steps."""
    denoiser = Denoiser(Echo(), Schedule.cosine(64), "sample", shape=(2, 3, 5))
    n, steps, seen = 23, 3, []
    real = samplers.sample

    def watched(denoiser, noise, *args, fresh, **kwargs):
        def noted(x):
            seen[-1].append(fresh(x))
            return seen[-1][-1]

        seen.append([noise])
        return real(denoiser, noise, *args, fresh=noted, **kwargs)

    monkeypatch.setattr(samplers, "sample", watched)
    images(denoiser, n, steps=steps, seed=11, batch_size=batch_size, sampler=sampler)
    found = [torch.cat(parts) for parts in zip(*seen, strict=True)]
    generators = [torch.Generator().manual_seed(11 + i) for i in range(n)]
    assert len(found) >= (1 if sampler == "ddim" else steps)
    for noise in found:
        assert torch.equal(noise, torch.cat([torch.randn(1, 2, 3, 5, generator=g) for g in generators]))


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "ancestral"])
def test_a_networks_images_are_the_same_in_any_batch(cli, here, sampler):
    args = ["sample", "labelled", "-n", 40, "--steps", 3, "--sampler", sampler, "--seed", 4]
    sizes = (1, 7, 64)
    for size in sizes:
        assert cli(*args, "--batch-size", size, "--out", f"{size}.npz").code == 0
    arrays = [np.load(f"{size}.npz")["arr_0"].astype(int) for size in sizes]
    assert arrays[0].std() > 10 and len(np.unique(arrays[0], axis=0)) == 40
    for one, other in ((0, 1), (0, 2), (1, 2)):
        far = np.abs(arrays[one] - arrays[other])
        assert far.max() <= 1 and (far > 0).mean() < 1e-3
    assert cli(*args[:-1], 14, "-n", 30, "--batch-size", 64, "--out", "later.npz").code == 0
    labels = np.arange(30) % 5
    assert np.array_equal(np.load("later.npz")["arr_1"], labels)
    later = np.load("later.npz")["arr_0"].astype(int)  # 4 + 10 + i, and labels 10 + i and i are equal mod 5
    assert np.abs(later - arrays[2][10:]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("out", ["drawn", "drawn.npz"])
def test_two_processes_draw_what_one_does(here, launched, out):
    args = ["sample", here / "labelled", "-n", 45, "--steps", 2, "--batch-size", 7, "--device", "cpu"]
    for processes in (1, 2):
        place = here / str(processes)
        ran = launched(processes, *args, "--out", place / out)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("images/s") == 1
    assert tree(here / "1") == tree(here / "2")
    assert len(tree(here / "1")) == (48 if out == "drawn" else 2)


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize(
    ("scheduler", "prediction", "steps"),
    [
        ("cosine", "v_prediction", 4),
        ("cosine", "sample", 1),
        ({**TRAILING, "clip_sample": False}, "epsilon", 10),
        ({**TRAILING, "clip_sample": True, "clip_sample_range": 0.7}, "v_prediction", 5),
    ],
)
def test_float32_is_the_stock_pipelines_images(
    cli, tmp_path, make_pipeline, classes, scheduler, prediction, steps
):
    folder = make_pipeline(
        tmp_path, classes=classes, channels=3, scheduler=scheduler, prediction=prediction, seed=3
    )
    n, seed = 9, 21
    labels = None if classes is None else [i % classes for i in range(n)]
    stock = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    assert type(stock).__name__ == ("DDIMPipeline" if classes is None else "ConsistencyModelPipeline")
    more = {"eta": 0.0} if classes is None else {"class_labels": labels}
    expected = stock(
        batch_size=n,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(n)],
        num_inference_steps=steps,
        output_type="np",
        **more,
    ).images
    expected = (expected * 255).round().astype(np.uint8)
    ours = images(diffkd.load(folder), n, steps=steps, seed=seed, labels=labels, batch_size=n)
    assert expected.std() > 10 and np.abs(ours.astype(int) - expected.astype(int)).max() == 0
    args = ["--out", tmp_path / "drawn", "-n", n, "--seed", seed, "--steps", steps]
    assert cli("sample", folder, *args, "--dtype", "float32", "--device", "cpu").code == 0
    assert np.array_equal(pixels(tmp_path / "drawn"), expected)


def test_bfloat16_is_near_float32(cli, here):
    for dtype in ("float32", "bfloat16"):
        args = ["-n", 32, "--steps", 4, "--dtype", dtype, "--out", f"{dtype}.npz", "--device", "cpu"]
        code, out, err = cli("sample", "labelled", *args)
        assert (code, err) == (0, "") and dtype in out
    one, other = (np.load(f"{dtype}.npz")["arr_0"].astype(int) for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(one - other).mean() < 2 and np.abs(one - other).max() < 40


# labels ---------------------------------------------------------------------------------------------------


def test_classes_of_the_data(cli, here):
    counts = [60, 0, 25, 10, 5]
    edit_card(here / "labelled", class_counts=counts)
    args = ["sample", "labelled", "--steps", 1, "--classes", "data"]
    for n in (40, 200):
        assert cli(*args, "-n", n, "--out", f"{n}.npz").code == 0
    few, many = (np.load(f"{n}.npz") for n in (40, 200))
    assert np.array_equal(many["arr_1"][:40], few["arr_1"])
    assert np.abs(many["arr_0"][:40].astype(int) - few["arr_0"].astype(int)).max() <= 1
    assert np.abs(np.bincount(many["arr_1"], minlength=5) - 2 * np.array(counts)).max() <= 2
    assert cli(*args, "-n", 40, "--out", "drawn").code == 0  # labels reach their images
    given = images(diffkd.load("labelled"), 40, steps=1, labels=few["arr_1"].tolist(), batch_size=40)
    assert np.array_equal(pixels(here / "drawn"), given) and np.array_equal(few["arr_0"], given)


@pytest.mark.parametrize("out", ["drawn", "drawn.npz"])
def test_classes_of_data_without_counts_in_the_card(cli, here, out):
    args = ["sample", "labelled", "--steps", 1, "--classes", "data", "--out", out]
    refuse(cli, here, *args, says=["labelled", "how often each class", "--classes balanced"])
    edit_card(here / "labelled", steps=1)
    refuse(cli, here, *args, says=["labelled", "how often each class", "--classes balanced"])


@pytest.mark.parametrize("counts", [[1, 2, 3], [1] * 6, [0] * 5, [-1, 2, 3, 4, 5], "many", [None] * 5])
def test_invalid_class_counts(cli, here, counts):
    """A card is an untrusted file."""
    edit_card(here / "labelled", class_counts=counts)
    refuse(cli, here, "sample", "labelled", "--steps", 1, "--classes", "data", "--out", "drawn")


# files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{"channels": 1}, {"channels": 3, "size": (8, 16)}])
def test_formats_hold_the_same_pixels(cli, tmp_path, make_pipeline, shape):
    model = make_pipeline(tmp_path, **shape)
    args = ["sample", model, "-n", 10, "--steps", 1, "--device", "cpu"]
    assert cli(*args, "--format", "webp", "--out", tmp_path / "webp").code == 0
    assert cli(*args, "--format", "png", "--out", tmp_path / "png").code == 0
    assert cli(*args, "--out", tmp_path / "drawn.npz").code == 0
    names = [p.name for p in sorted((tmp_path / "webp").iterdir())]
    assert names == [*(f"{i:06d}.webp" for i in range(10)), "diffkd.json"]
    png = pixels(tmp_path / "png").reshape(np.load(tmp_path / "drawn.npz")["arr_0"].shape)
    webp = pixels(tmp_path / "webp")
    assert png.std() > 10 and np.array_equal(png, np.load(tmp_path / "drawn.npz")["arr_0"])
    assert np.array_equal(webp[..., : png.shape[-1]] if webp.ndim == 4 else webp[..., None], png)
    grids = [tmp_path / name for name in ("webp-grid.png", "png-grid.png", "drawn.grid.png")]
    sheets = [np.asarray(Image.open(path).convert("RGB")) for path in grids]
    assert np.array_equal(sheets[0], sheets[1]) and np.array_equal(sheets[1], sheets[2])


@pytest.mark.parametrize("n", [5, 64, 70])
@pytest.mark.parametrize("out", ["drawn", "drawn.v2.npz"])
def test_the_grid_is_of_the_first_64(cli, here, out, n):
    assert cli("sample", "plain", "-n", n, "--steps", 1, "--batch-size", 9, "--out", out).code == 0
    path = here / ("drawn-grid.png" if out == "drawn" else "drawn.v2.grid.png")
    picture, shown, factor = np.asarray(Image.open(path)), min(n, 64), 4
    step = 8 * factor + 2  # with a gap
    large = [picture[step * (i // 8) :, step * (i % 8) :][: step - 2, : step - 2] for i in range(shown)]
    tiles = [tile[::factor, ::factor] for tile in large]
    for tile, enlarged in zip(tiles, large, strict=True):
        assert np.array_equal(enlarged, tile.repeat(factor, 0).repeat(factor, 1))
    assert all((picture[:, step * i - 2 : step * i] == 128).all() for i in range(1, 8))
    whole = pixels(here / "drawn") if out == "drawn" else np.load(out)["arr_0"]
    assert len(whole) == n and np.array_equal(np.stack(tiles), whole[:64])
    assert picture.shape[:2] == (step * -(-shown // 8) - 2, step * 8 - 2)


def test_an_npz_is_what_generate_gives(cli, here):
    for model, labelled in (("labelled", True), ("plain", False)):
        args = ["-n", 37, "--steps", 2, "--batch-size", 5, "--seed", 3, "--device", "cpu"]
        assert cli("sample", model, *args, "--out", f"{model}.npz").code == 0
        with np.load(f"{model}.npz", allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        expected = images(diffkd.load(model), 37, steps=2, batch_size=5, seed=3)
        assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == (37, 8, 8, 3)
        assert np.array_equal(found["arr_0"], expected) and ("arr_1" in found) == labelled
        if labelled:
            assert found["arr_1"].dtype == np.int64 and found["arr_1"].tolist() == [i % 5 for i in range(37)]


# what it prints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "steps", "nfe"), [("ddim", 3, 3), ("heun", 3, 5), ("dpmpp_2m", 2, 2), ("ancestral", 3, 3)]
)
def test_it_reports_its_speed(cli, here, drawn, sampler, steps, nfe):
    args = ["-n", 12, "--steps", steps, "--sampler", sampler, "--device", "cpu", "--out", "drawn"]
    code, out, err = cli("sample", "plain", *args)
    assert (code, err) == (0, "") and sum(drawn) == 12 * nfe
    for words in (f"nfe {nfe}", "12 images", "cpu", "float32", "eager", "drawn"):
        assert words in out
    rate = float(re.search(r"([\d.]+) images/s", out)[1])
    took = float(re.search(r"([\d.]+) ms an image", out)[1])
    assert rate * took == pytest.approx(1000, rel=0.02)
    shares = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)%", out)}
    assert {"noise", "network", "writing"} <= shares.keys()
    assert all(value >= 0 for value in shares.values()) and 20 < sum(shares.values()) <= 100.5


def test_other_steps_than_the_students_are_warned_of(cli, here):
    edit_card(here / "plain", steps=4)
    code, out, err = cli("sample", "plain", "-n", 2, "--steps", 2, "--out", "two")
    assert code == 0 and "nfe 2" in out and len(pixels(here / "two")) == 2
    assert len(err.splitlines()) == 1 and "4 steps" in err and "2" in err
    code, out, err = cli("sample", "plain", "-n", 2, "--out", "four")
    assert (code, err) == (0, "") and "nfe 4" in out


@pytest.mark.parametrize("out", ["drawn", "new/drawn.npz"])
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--mode", "graph", "--device", "cpu"], ["graph", "cpu"]),
        (["--mode", "fast"], ["'fast'", "auto, eager, graph, compile"]),
        (["--format", "jpg"], ["jpg"]),
        (["--dtype", "float64"], ["'float64'", "float32, bfloat16, float16"]),
        (["--dtype", ""], ["''", "float32"]),
        (["--workers", -1], ["--workers"]),
        (["--batch-size", 0], ["--batch-size"]),
        (["-n", 0], ["-n"]),
    ],
)
def test_invalid_options(cli, here, out, args, says):
    refuse(cli, here, "sample", "plain", "--steps", 1, "--out", out, *args, says=says)


@pytest.mark.parametrize(("option", "value"), [("--format", "webp"), ("--workers", 2)])
def test_options_of_a_folder_are_not_for_an_npz(cli, here, option, value):
    refuse(
        cli, here, "sample", "plain", "--steps", 1, "--out", "d.npz", option, value, says=[option, "d.npz"]
    )


def test_invalid_options_leave_existing_images_alone(cli, here):
    assert cli("sample", "plain", "--steps", 1, "-n", 3, "--out", "drawn").code == 0
    for args in (["--mode", "graph"], ["--format", "gif"], ["--dtype", "int8"], ["--classes", "0"]):
        more = ["--seed", 9, "--device", "cpu", "--overwrite", *args]
        refuse(cli, here, "sample", "plain", "--steps", 1, "-n", 3, "--out", "drawn", *more)


# existing images ------------------------------------------------------------------------------------


def test_more_images_are_the_missing_ones_only(cli, here, drawn):
    args = ["sample", "labelled", "--steps", 1, "--batch-size", 4, "--out", "drawn"]
    assert cli(*args, "-n", 8).code == 0
    before = {p.name: p.stat().st_mtime_ns for p in (here / "drawn").glob("*.png")}
    drawn.clear()
    assert cli(*args, "-n", 30).code == 0
    assert sum(drawn) == 22 and len(pixels(here / "drawn")) == 30
    assert {name: (here / "drawn" / name).stat().st_mtime_ns for name in before} == before
    for gone in (5, 6, 17):
        (here / "drawn" / f"{gone:06d}.png").unlink()
    drawn.clear()
    assert cli(*args, "-n", 30).code == 0 and sum(drawn) == 8  # two batches
    assert cli(*args[:-1], "whole", "-n", 30).code == 0
    assert tree(here / "drawn") == tree(here / "whole")
    assert (here / "drawn-grid.png").read_bytes() == (here / "whole-grid.png").read_bytes()
    drawn.clear()
    code, out, err = cli(*args, "-n", 30)
    assert (code, err, drawn) == (0, "", []) and "all 30 images exist already" in out
    refuse(cli, here, *args, "-n", 29, says=["drawn", "30", "29", "--overwrite"])


@pytest.mark.parametrize("out", ["drawn", "drawn.npz"])
@pytest.mark.parametrize(
    "other",
    [
        {"steps": 1},
        {"model": "other"},
        {"dtype": "bfloat16"},
        {"classes": "1,2"},
        {"sampler": "heun"},
        {"seed": 1, "n": 3},
    ],
    ids=lambda other: next(iter(other)),
)
def test_images_of_other_settings_are_replaced_only_with_overwrite(cli, here, make_pipeline, out, other):
    make_pipeline(here, name="other", channels=3, classes=5, seed=1)

    def command(*more, model="labelled", n=6, **options):
        args = {"steps": 2, "seed": 0, "dtype": "float32", "classes": "0-4", "sampler": "ddim", **options}
        flags = [part for key, value in args.items() for part in (f"--{key}", value)]
        return ["sample", model, "-n", n, "--device", "cpu", *flags, *more]

    assert cli(*command("--out", out)).code == 0
    refuse(cli, here, *command("--out", out, **other), says=[out, "--overwrite"])
    assert cli(*command("--out", out, "--overwrite", **other)).code == 0
    assert cli(*command("--out", f"fresh{out[5:]}", **other)).code == 0
    grid = "-grid.png" if out == "drawn" else ".grid.png"
    assert (here / f"drawn{grid}").read_bytes() == (here / f"fresh{grid}").read_bytes()
    if out == "drawn":
        assert tree(here / "drawn") == tree(here / "fresh")
    else:
        assert (here / "drawn.npz").read_bytes() == (here / "fresh.npz").read_bytes()
    assert not [p for p in here.iterdir() if p.name.startswith(".")]


def test_an_npz_of_fewer_images_is_replaced_only_with_overwrite(cli, here):
    args = ["sample", "plain", "--steps", 1, "--out", "drawn.npz"]
    assert cli(*args, "-n", 3).code == 0
    refuse(cli, here, *args, "-n", 5, says=["drawn.npz", "3", "5", "--overwrite"])
    refuse(cli, here, *args, "-n", 2, says=["drawn.npz", "3", "2", "--overwrite"])
    assert cli(*args, "-n", 5, "--overwrite").code == 0
    assert len(np.load("drawn.npz")["arr_0"]) == 5


@pytest.mark.parametrize("out", ["drawn", "drawn.npz"])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_broken_model_replaces_nothing(cli, here, make_pipeline, out, batch_size):
    broken = make_pipeline(here, name="broken", channels=3, seed=2)
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"][1] = torch.nan
    save_file(weights, path)
    assert cli("sample", "plain", "--steps", 1, "-n", 9, "--out", out).code == 0
    args = ["sample", "broken", "--steps", 1, "-n", 9, "--batch-size", batch_size]
    refuse(cli, here, *args, "--out", out, "--overwrite", says="NaN")
    refuse(cli, here, *args, "--out", "new/" + out, says="NaN")


def test_a_model_that_is_broken_for_one_class_replaces_no_file(cli, here, make_pipeline):
    """Its first batches are fine: an .npz is replaced only once the new one is complete."""
    broken = make_pipeline(here, name="broken", channels=3, classes=5, seed=2)
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["class_embedding.weight"][3] = torch.nan
    save_file(weights, path)
    args = ["--steps", 1, "-n", 9, "--batch-size", 1, "--out", "drawn.npz"]
    assert cli("sample", "plain", *args).code == 0
    before = tree(here)
    code, stdout, err = cli("sample", "broken", *args, "--overwrite")
    assert (code, stdout, len(err.splitlines())) == (2, "", 1) and "NaN" in err
    assert [name for name in before if tree(here).get(name) != before[name]] == []
