"""`diffkd export`: what each kind writes is opened by its own reader, and is the student."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffkd
from diffkd.core.denoiser import GUIDANCE
from diffkd.errors import UserError
from diffkd.models import exports, loading, saving
from diffkd.models.exports import batched, fp16, onnx, program, single_file, torch_export
from diffkd.models.masked_prompts import MASK
from diffkd.models.source import ADAPTER
from tests import text_to_image
from tests.exports import OF_DIFFKD, STEPS, run_card, student, teacher
from tests.refusals import refuse, tree
from tests.stock import BARRED

TRANSFORMERS = ("sd3", "flux", "sana", "lumina2", "z_image", "qwen_image")
TRACED_ANEW = ("lumina2", "qwen_image")  # beside z_image
OTHERS = ("ldm", "edm", *OF_DIFFKD)


def exhaustive(kind):
    return pytest.param(kind, marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Students are made in it when a test first asks for them."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture
def made(work, cli):
    """made(kind of student, kind of export) -> (the student's folder, the export's). No stock file of either
    names a folder of this machine."""

    def export(kind: str, to: str, **how) -> tuple[Path, Path]:
        folder = work / (kind if how.get("rank") is None else f"{kind}-lora")
        if not folder.exists():
            student(work, kind, **how)
        out = folder.with_name(f"{folder.name}-{to}")
        if not out.exists():
            outcome = cli("export", folder, "--to", to)
            assert (outcome.code, outcome.stderr) == (0, ""), outcome
            for path in (path for place in (folder, out) for path in place.rglob("*.json")):
                assert path.name == "diffkd.json" or str(work) not in path.read_text(), path
        return folder, out

    return export


@pytest.fixture(scope="module")
def pixels(tmp_path_factory, make_pipeline) -> Path:
    """A student of four steps on pixels, of three classes."""
    from diffkd.runs.reports import model_card

    work = tmp_path_factory.mktemp("pixels")
    made = loading.load(make_pipeline(work, classes=3))
    made.steps, made.clip = STEPS, None
    saving.save(made, work / "student")
    model_card.write(work / "student", model_card.describe(made))
    return work / "student"


def same(network, other) -> None:
    """Every tensor of a network, in another."""
    mine, theirs = network.state_dict(), other.state_dict()
    assert mine.keys() <= theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


def outputs(denoiser, *, count=3, seed=2):
    """Of a denoiser, and the inputs by name."""
    sample, time, cond = program.inputs_of(denoiser, count, seed)
    given = program.named(sample, time, cond)
    return stocks(denoiser, **given), given


@torch.no_grad()
def stocks(denoiser, sample, timestep, cond=None):
    """What the stock network itself computes."""
    found = program.function_of(denoiser)(denoiser.network, sample, timestep, cond or {})
    return program.sample_of(found)


def in_16_bits(given, dtype):
    """States and embeddings; times stay as they are."""
    if isinstance(given, dict):
        return {key: in_16_bits(value, dtype) for key, value in given.items()}
    return given.to(dtype) if given.is_floating_point() and given.ndim > 1 else given


# one file


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_one_file_in_the_original_layout_is_the_model(made, kind):
    """By from_single_file, every weight to the bit, and by the card's own call the student's pixels. Other
    programs tell the families apart by these keys."""
    folder, out = made(kind, "single-file")
    drawn = '"a red boat", output_type="np", generator=torch.Generator().manual_seed(5)'
    names = run_card(out, {'"what to draw"': drawn, "from diffusers": "import torch\nfrom diffusers"})
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    for part in ("vae", "text_encoder", *["text_encoder_2"] * (kind == "xl")):
        same(getattr(stock, part), getattr(names["pipeline"], part))
    assert stock.scheduler.config.items() <= {**names["pipeline"].scheduler.config}.items()
    theirs, own = names["pipeline"].unet.state_dict(), stock.unet.state_dict()
    assert own.keys() - theirs.keys() == {"time_embedding.cond_proj.weight"}  # which has no place in it
    assert all(torch.equal(value, own[key]) for key, value in theirs.items())
    generator = torch.Generator().manual_seed(5)
    images = stock("a red boat", num_inference_steps=STEPS, output_type="np", generator=generator).images
    assert images.std() > 0.01 and np.abs(images - names["images"]).max() < 1e-5
    keys = load_file(out / single_file.WHOLE)
    clip = "cond_stage_model.transformer." if kind == "sd" else "conditioner.embedders.0.transformer."
    assert f"{clip}text_model.embeddings.position_embedding.weight" in keys
    assert ("conditioner.embedders.1.model.text_projection" in keys) is (kind == "xl")
    assert keys["first_stage_model.encoder.mid.attn_1.q.weight"].shape[2:] == (1, 1)  # convolutions there
    assert keys["model.diffusion_model.input_blocks.0.0.weight"].shape == (8, 4, 3, 3)


def test_stable_diffusion_2_has_its_encoder_as_open_clip_has_it(work, cli, monkeypatch):
    """Programs know it by the width of its text encoder."""
    folder = work / "sd" if (work / "sd").exists() else student(work, "sd")
    monkeypatch.setattr(single_file, "OPEN_CLIP_WIDTH", 16)
    assert cli("export", folder, "--to", "single-file", "--out", work / "sd2").code == 0
    keys = load_file(work / "sd2" / single_file.WHOLE)
    query = keys["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"]
    encoder = diffusers.DiffusionPipeline.from_pretrained(folder).text_encoder.state_dict()
    (name,) = (name for name in encoder if name.endswith("layers.1.self_attn.v_proj.weight"))
    assert query.shape == (48, 16) and torch.equal(query[32:], encoder[name])


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_one_file_of_a_transformer_is_its_network(made, work, kind):
    if kind in ("z_image", "qwen_image") and not hasattr(diffusers, "QwenImageTransformer2DModel"):
        pytest.skip("the installed diffusers has none")
    folder, out = made(kind, "single-file")
    stock = loading.load(folder).network
    read = type(stock).from_single_file(
        str(out / single_file.NETWORK), config=str(out), subfolder="transformer"
    )
    same(stock, read)
    code = (out / "README.md").read_text()
    assert f"{type(stock).__name__}.from_single_file(" in code and f"{work / kind}-teacher" in code


def test_a_unet_that_the_layout_has_no_place_for_is_refused(work, cli):
    """Of blocks of different sizes, as smaller students may have."""
    pipeline = text_to_image.pipeline(work / "parts" / "odd", layers_per_block=(1, 2))
    pipeline.save_pretrained(work / "odd-teacher", safe_serialization=True)
    student(work, "odd")
    refuse(cli, work, "export", work / "odd", "--to", "single-file", says="does not fit a single file")


# half precision


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")  # SDXL's pipeline's own
@pytest.mark.parametrize(
    "kind", ["sd", "dit", "edm", *map(exhaustive, ("xl", "pixart_sigma", *TRANSFORMERS))]
)
def test_half_precision_is_the_student_to_half_precision(made, kind):
    """Files by diffusers' names of the variant, opened as the card says; the numbers are those of the weights
    rounded once, and the images those of the student."""
    folder, out = made(kind, "fp16")
    component = "unet" if (out / "unet").is_dir() else "transformer"
    weights = load_file(out / component / "diffusion_pytorch_model.fp16.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
    assert not [*out.rglob("diffusion_pytorch_model.safetensors")] and not [*out.rglob("model.safetensors")]
    stock = getattr(run_card(out)["pipeline"], component)
    assert stock.dtype == torch.float16
    own, again = loading.load(folder), loading.load(out)  # read as all others are, by the only variant
    rounded = {key: value.half() for key, value in own.network.state_dict().items()}
    found = again.network.state_dict()
    for key, value in found.items():
        assert torch.equal(rounded[key].float(), value) or not value.is_floating_point(), key
    (mine, given), (theirs, _) = outputs(own), outputs(again)
    assert 0 < (mine - theirs).abs().max() <= 2e-2 * mine.abs().max()
    half = loading.load(out, dtype=torch.float16)
    theirs = stocks(half, **in_16_bits(given, torch.float16))
    assert (mine - theirs.float()).abs().max() <= 5e-2 * mine.abs().max()


def test_shards_are_named_as_diffusers_names_them():
    from diffkd.models.exports.fp16 import named

    of_shard = "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert named(of_shard) == "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"
    assert named("model.safetensors") == "model.fp16.safetensors"


def test_weights_beyond_half_precision_are_refused(pixels, work, cli):
    folder = shutil.copytree(pixels, work / "large")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"][0] = 1e5
    save_file(weights, path, {"format": "pt"})
    refuse(
        cli, work, "export", folder, "--to", "fp16", says=["NaN or infinite", "torch.float16 is too narrow"]
    )


# programs

PROGRAM = f"""{BARRED}
import torch
for folder in sys.argv[1:]:
    given = torch.load(folder + "-given.pt", weights_only=True)
    network = torch.export.load(folder + "/network.pt2").module()
    torch.save([network(**one) for one in given], folder + "-found.pt")
"""


def with_pixels(made, pixels, cli):
    """made(kind, to), that takes "pixels" too."""

    def export(kind, to):
        if kind != "pixels":
            return made(kind, to)
        out = pixels.with_name(to)
        assert out.exists() or cli("export", pixels, "--to", to, "--out", out).code == 0
        return pixels, out

    return export


@pytest.mark.parametrize(
    "kinds",
    [("pixels", "dit", "z_image"),
     *map(exhaustive, (("sd", "xl", "sd3", "flux", "sana", "pixart_sigma"), TRACED_ANEW, OTHERS))],
)  # fmt: skip
def test_a_program_of_torch_needs_no_diffkd(made, pixels, cli, kinds):
    """In a process that cannot import diffkd: batches of 1 and of 5, not the one that was traced, at other
    times, of other prompts and of other lengths of these."""
    expected = {}
    for kind in kinds:
        folder, out = with_pixels(made, pixels, cli)(kind, "torch-export")
        own = loading.load(folder)
        expected[str(out)], given = zip(*(outputs(own, count=count) for count in (1, 5)), strict=True)
        torch.save([*given], f"{out}-given.pt")
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *expected]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for out, outs in expected.items():
        for mine, theirs in zip(outs, torch.load(f"{out}-found.pt", weights_only=True), strict=True):
            assert (mine - theirs).abs().max() <= 1e-5 * mine.abs().max(), out


@pytest.mark.parametrize(
    "kind",
    ["pixels", "z_image",
     *map(exhaustive, ("sd", "xl", "dit", "sd3", "flux", "sana", "pixart_sigma", *TRACED_ANEW, *OTHERS))],
)  # fmt: skip
def test_onnx_runtime_computes_the_network(made, pixels, cli, kind):
    """Inputs by name, batches of 1 and of 5; the first size alone is free, and has a name."""
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, out = with_pixels(made, pixels, cli)(kind, "onnx")
    session = onnxruntime.InferenceSession(out / onnx.FILE, providers=["CPUExecutionProvider"])
    assert {one.shape[0] for one in [*session.get_inputs(), *session.get_outputs()]} == {"batch"}
    assert all(isinstance(size, int) for one in session.get_inputs() for size in one.shape[1:])
    own = loading.load(folder)
    for count in (1, 5):
        mine, given = outputs(own, count=count)
        given |= given.pop("cond", {})
        assert {one.name for one in session.get_inputs()} == {*given}
        (theirs,) = session.run(["output"], {key: value.numpy() for key, value in given.items()})
        assert np.abs(mine.numpy() - theirs).max() <= 1e-4 * mine.abs().max()


def test_no_program_tells_of_the_machine_that_made_it(made, pixels, cli):
    """Torch notes which lines of which files an operation came from, by their whole paths."""
    pytest.importorskip("onnxruntime")
    home = str(Path(diffkd.__file__).parents[1]).encode()
    libraries = str(Path(torch.__file__).parents[1]).encode()
    _, onnx_folder = with_pixels(made, pixels, cli)("pixels", "onnx")
    _, torch_folder = with_pixels(made, pixels, cli)("pixels", "torch-export")
    contents = [path.read_bytes() for path in onnx_folder.glob("network.onnx*")]
    with zipfile.ZipFile(torch_folder / torch_export.FILE) as archive:
        contents += [archive.read(name) for name in archive.namelist()]
    assert len(contents) > 5
    assert not [one for one in contents if home in one or libraries in one]


@pytest.mark.parametrize(
    ("kind", "to"),
    [("pixels", "torch-export"), ("pixels", "onnx"), ("z_image", "torch-export"),
     *(pytest.param(kind, "torch-export", marks=pytest.mark.exhaustive)
       for kind in ("sd", "sd3", "flux", *TRACED_ANEW, *OTHERS))],
)  # fmt: skip
def test_the_loop_of_a_programs_card_draws_the_student(made, pixels, cli, kind, to):
    """Its code as it stands, but for the noise and the labels: the last state is that of diffkd's sampler."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    folder, out = with_pixels(made, pixels, cli)(kind, to)
    own = loading.load(folder)
    x, _, cond = own.example_inputs()
    noise = torch.stack([torch.randn(x.shape[1:], generator=torch.manual_seed(i)) for i in range(4)])
    torch.save(noise, f"{out}-noise.pt")
    changes = {f"torch.randn(4, {', '.join(map(str, x.shape[1:]))})": f"torch.load('{out}-noise.pt')"}
    cond = {
        key: (torch.ones if key == MASK else torch.zeros)(4, *value.shape[1:], dtype=value.dtype)
        for key, value in cond.items()
    }
    if GUIDANCE in cond:
        cond[GUIDANCE] = torch.full((4,), own.usual_guidance)
    if kind == "pixels":
        changes["torch.zeros(4, dtype=torch.int64)"] = "torch.tensor([0, 1, 2, 0])"
        cond["class_labels"] = torch.tensor([0, 1, 2, 0])
    names = run_card(out, changes)
    with torch.no_grad():
        x0 = diffkd.samplers.sample(own, noise, STEPS, **cond)
    assert (x0 - names["x"]).abs().max() <= 1e-4 * x0.abs().max()


@pytest.mark.exhaustive
def test_a_weight_that_is_an_input_is_one_of_a_program(work, cli):
    """Any within its range; the card's code names the usual one."""
    folder = student(work, "sd", guided=True)
    out = work / "sd-guided-torch-export"
    assert cli("export", folder, "--to", "torch-export").code == 0
    own, network = loading.load(folder), torch.export.load(out / torch_export.FILE).module()
    (usual, given) = outputs(own)
    given["cond"]["guidance_scale"] = torch.tensor([1.0, 4.0, 9.0])
    mine = stocks(own, **given)
    assert (mine - usual).abs().max() > 1e-3 * mine.abs().max()
    assert (mine - network(**given)).abs().max() <= 1e-5 * mine.abs().max()
    x, _, _ = own.example_inputs()
    names = run_card(
        out, {f"torch.randn(4, {', '.join(map(str, x.shape[1:]))})": "noise = torch.ones(4, 4, 8, 8)"}
    )
    assert names["cond"]["guidance_scale"].tolist() == [7.5] * 4 and torch.isfinite(names["x"]).all()
    refuse(cli, work, "export", folder, "--to", "single-file", says="takes its guidance as an input")


# adapters


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_an_adapter_goes_alone(made, kind):
    """Files of the student, for the two kinds of readers, with its scheduler; stock reads either."""
    folder, lora = made(kind, "lora", rank=4)
    _, kohya = made(kind, "kohya", rank=4)
    assert sorted(path.name for path in lora.iterdir()) == ["README.md", "diffkd.json", ADAPTER, "scheduler"]
    assert (lora / ADAPTER).read_bytes() == (folder / ADAPTER).read_bytes()
    own, theirs = (load_file(place / "kohya_lora_weights.safetensors") for place in (folder, kohya))
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    seeded = {"num_inference_steps": "generator=__import__('torch').manual_seed(3), num_inference_steps"}
    drawn = [run_card(place, seeded) for place in (folder, lora, kohya)]
    pictures = [np.asarray(names["images"][0]).astype(int) for names in drawn]
    assert np.array_equal(pictures[0], pictures[1]) and np.abs(pictures[0] - pictures[2]).max() <= 1
    assert pictures[0].std() > 5
    assert "ComfyUI and A1111 load" in (kohya / "README.md").read_text()


@pytest.mark.parametrize("kind", ["sd3", "flux", "sana"])
def test_an_adapter_of_a_transformer_goes_alone(made, cli, kind):
    """Stock reads peft's names. Kohya's are for ComfyUI: for those of Stable Diffusion 3 stock draws the
    base, with no error, and of Flux's it reads the attention alone."""
    folder, lora = made(kind, "lora", rank=4)
    assert (lora / ADAPTER).read_bytes() == (folder / ADAPTER).read_bytes()
    drawn = "generator=__import__('torch').manual_seed(3), num_inference_steps"
    pictures = [
        np.asarray(run_card(place, {"num_inference_steps": drawn})["images"][0]).astype(int)
        for place in (folder, lora)
    ]
    assert np.array_equal(*pictures) and pictures[0].std() > 5
    if kind == "sana":
        refuse(cli, folder.parent, "export", folder, "--to", "kohya", says="whose keys other programs read")
        return
    _, kohya = made(kind, "kohya", rank=4)
    own, theirs = (load_file(place / "kohya_lora_weights.safetensors") for place in (folder, kohya))
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    card = (kohya / "README.md").read_text()
    assert "ComfyUI loads" in card and "--to lora" in card
    assert "```python" not in card and "A1111" not in card


def test_an_adapter_is_exported_whole_with_its_base(made):
    folder, out = made("sd", "fp16", rank=4)
    (mine, _), (theirs, _) = outputs(loading.load(folder)), outputs(loading.load(out))
    assert 0 < (mine - theirs).abs().max() <= 2e-2 * mine.abs().max()
    card = json.loads((out / "diffkd.json").read_text())
    assert "lora" not in card and card["export"] == {"kind": "fp16", "dtype": "float16"}


# 8 bits


@pytest.mark.parametrize("kind", ["sd", "dit", *map(exhaustive, ("xl", "pixart_sigma", *TRANSFORMERS))])
def test_8_bits_are_opened_by_stock_and_are_those_in_memory(made, kind):
    """Stock opens the folder as its card says and diffkd as any other: both have the integers and scales that
    torchao makes of the student's weights, and compute the same to the bit."""
    torchao = pytest.importorskip("torchao.quantization")
    folder, out = made(kind, "int8")
    component = "unet" if (out / "unet").is_dir() else "transformer"
    stock = getattr(run_card(out)["pipeline"], component)
    again = loading.load(out)

    memory = loading.load(folder, dtype=torch.bfloat16)
    torchao.quantize_(memory.network, torchao.Int8WeightOnlyConfig())
    integers = 0
    for name, weight in memory.network.named_parameters():
        for other in (stock.get_parameter(name), again.network.get_parameter(name)):
            if type(weight).__name__ == "Int8Tensor":
                assert torch.equal(weight.qdata, other.qdata) and torch.equal(weight.scale, other.scale), name
                integers += 1
            else:
                assert torch.equal(weight.float(), other.float()), name
    assert integers > 4
    _, given = outputs(again)
    sixteen = in_16_bits(given, torch.bfloat16)
    half = loading.load(out, dtype=torch.bfloat16)
    assert torch.equal(stocks(memory, **sixteen), stocks(half, **sixteen))
    (plain, _), (read, _) = outputs(loading.load(folder)), outputs(again)
    assert read.dtype == torch.float32 and 0 < (plain - read).abs().max() <= 0.1 * plain.abs().max()
    config = json.loads((out / component / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    held = json.loads((out / "diffkd.json").read_text())
    assert 0 < held["export"]["share"] <= 1 and held["bytes"] < loading.card(folder)["bytes"]


def test_8_bits_are_drawn_and_are_no_teacher(made, cli, tmp_path):
    pytest.importorskip("torchao")
    _, out = made("dit", "int8")
    outcome = cli("sample", out, "--out", tmp_path / "x.npz", "-n", 2)
    assert (outcome.code, outcome.stderr) == (0, "")
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps({"out": str(tmp_path / "run"), "teacher": {"path": str(out)}, "data": {"kind": "none"},
                    "method": {"name": "sid", "steps": 2}, "evaluation": None})
    )  # fmt: skip
    refuse(cli, tmp_path, "distill", config, says="has weights in 8 bits")


def test_other_8_bits_are_not_opened(made, cli, tmp_path):
    """A config that names another class of torchao is refused before anything of it is built."""
    pytest.importorskip("torchao")
    _, out = made("dit", "int8")
    folder = shutil.copytree(out, tmp_path / "other")
    path = folder / "transformer" / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["quant_type"]["default"]["_type"] = "quantize_"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="quantized by 'torchao', and are not opened"):
        loading.load(folder)


# refusals


def test_bad_input_is_one_line(made, pixels, work, cli, tmp_path):
    refuse(cli, tmp_path, "export", pixels, "--to", "onxx", says=["--to onxx is unknown", "the nearest onnx"])
    says = ["--to lora, which takes a student of kind lora", "there are onnx, torch-export, fp16"]
    refuse(cli, tmp_path, "export", pixels, "--to", "lora", says=says)
    refuse(cli, tmp_path, "export", pixels, "--to", "int8", says="mostly in linear layers")
    refuse(cli, tmp_path, "export", teacher(work, "sd"), "--to", "fp16", says="is no student of diffkd")
    refuse(cli, tmp_path, "export", tmp_path, "--to", "fp16", says="is no student of diffkd")
    refuse(cli, tmp_path, "export", pixels, "--to", "fp16", "--out", pixels, says="exists already")
    _, out = made("sd", "single-file")
    refuse(cli, tmp_path, "export", out, "--to", "fp16", says="is an export already (single-file)")
    refuse(cli, tmp_path, "sample", out, "--out", tmp_path / "x", says="an export of the kind single-file")


def test_a_missing_package_is_named(pixels, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "find_spec", lambda name: name != "onnxscript" or None)
    refuse(cli, tmp_path, "export", pixels, "--to", "onnx", says="needs onnxscript; install it with pip")


def test_a_network_that_cannot_be_traced_is_one_line(work, cli, monkeypatch):
    """Of torch, which prints what it traced."""
    if not (folder := work / "z_image").exists():
        student(work, "z_image")
    monkeypatch.setattr(batched, "of", lambda denoiser: None)
    says = ["ZImageTransformer2DModel that torch", "cannot trace", "--to fp16"]
    refuse(cli, work, "export", folder, "--to", "torch-export", "--out", work / "untraced", says=says)


@pytest.mark.parametrize(
    ("raised", "code"), [(UserError("it failed; try again"), 2), (KeyboardInterrupt(), 130)]
)
def test_nothing_is_left_of_an_export_that_fails(pixels, cli, tmp_path, monkeypatch, raised, code):
    def broken(student, folder):
        (folder / torch_export.FILE).write_bytes(b"half")
        raise raised

    monkeypatch.setattr(torch_export, "write", broken)
    before = tree(pixels.parent)
    outcome = cli("export", pixels, "--to", "torch-export", "--out", pixels.with_name("broken"))
    assert (outcome.code, len(outcome.stderr.splitlines())) == (code, int(code == 2)), outcome
    assert tree(pixels.parent) == before


def test_another_programs_folder_stays(pixels, cli, tmp_path, monkeypatch):
    """One that came while an export was under way."""
    out = tmp_path / "other"

    def slow(student, folder):
        out.mkdir()
        (out / "mine").write_text("mine")
        return {"export": {"dtype": "float16"}}

    monkeypatch.setattr(fp16, "write", slow)
    outcome = cli("export", pixels, "--to", "fp16", "--out", out)
    assert outcome.code == 2 and "was made by another program" in outcome.stderr
    assert [path.name for path in out.parent.iterdir()] == ["other"] and (out / "mine").is_file()


@pytest.mark.parametrize("named", [".", "../../student", "..", "students/"])
def test_the_name_is_that_of_the_folder(pixels, cli, tmp_path, monkeypatch, named):
    """However it is given: beside it, and not in it."""
    folder = shutil.copytree(pixels, tmp_path / "student")
    shutil.copytree(pixels, folder / "students")
    monkeypatch.chdir(folder if named in (".", "students/") else folder / "unet")
    outcome = cli("export", named, "--to", "fp16")
    assert (outcome.code, outcome.stderr) == (0, "")
    expected = folder / "students-fp16" if named == "students/" else tmp_path / "student-fp16"
    assert (expected / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("to", "module", "raised"),
    [
        ("onnx", "torch.onnx.export", OSError(errno.ENOSPC, "No space left on device")),
        ("single-file", "diffkd.models.exports.single_file.save_file",
         RuntimeError("Error while serializing: No space left on device (os error 28)")),
    ],
)  # fmt: skip
def test_a_full_disk_is_no_fault_of_the_student(made, pixels, work, cli, monkeypatch, to, module, raised):
    """Found behind the errors of libraries: exit status 1, to be run again."""
    folder = pixels if to == "onnx" else made("sd", "single-file")[0]
    out = work / f"full-{to}"

    def full(*args, **how):
        raise ValueError("it failed") from raised

    monkeypatch.setattr(module, full)
    monkeypatch.setattr(program, "traced", lambda student: None)
    monkeypatch.setattr(onnx, "_without_idle_squeezes", lambda found: None)
    outcome = cli("export", folder, "--to", to, "--out", out)
    assert outcome.code == 1 and "the disk is full" in outcome.stderr and "Traceback" not in outcome.stderr
    assert not out.exists() and not [*work.glob(f".{out.name}*")]


def test_a_program_on_a_full_disk_is_an_error(tmp_path):
    """Torch would end the process, in C++."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = torch.export.export(torch.nn.Linear(100, 100), (torch.zeros(2, 100),))
    with torch_export._Remembering(tmp_path / "x.pt2", "w") as stream:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with program.silent():
                torch.export.save(found, stream)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert stream.error is not None and stream.error.errno == errno.EFBIG


def test_why_onnx_takes_no_network_is_said(pixels, work, cli, monkeypatch):
    """The first error of those that torch raises one of another, without its colours."""

    def fails(*args, **how):
        try:
            raise NotImplementedError("No ONNX function found for aten.this")
        except NotImplementedError as error:
            raise RuntimeError("\x1b[96mThis is step 3/3\x1b[0m") from error

    monkeypatch.setattr(torch.onnx, "export", fails)
    monkeypatch.setattr(program, "traced", lambda student: None)
    monkeypatch.setattr(onnx, "_without_idle_squeezes", lambda found: None)
    says = "does not go into ONNX (No ONNX function found for aten.this); use --to torch-export"
    refuse(cli, work, "export", pixels, "--to", "onnx", "--out", work / "unknown", says=says)
