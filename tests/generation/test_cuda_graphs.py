"""How images are generated: eagerly, compiled, in batches that fit into memory."""

import numpy as np
import pytest
import torch

import diffkd
from diffkd.errors import UserError
from diffkd.generation import cuda_graphs
from diffkd.generation.generator import ImageGenerator, generate
from diffkd.generation.pixels import to_pixels
from tests.refusals import refuse

SAMPLERS = ["ddim", "heun", "dpmpp_2m", "ancestral"]


@pytest.fixture(scope="module")
def denoisers(tmp_path_factory, make_pipeline):
    root = tmp_path_factory.mktemp("pipelines")
    return {n: diffkd.load(make_pipeline(root, name=str(n), classes=n)) for n in (None, 3)}


def inputs_of(images, count):
    """The inputs of one batch, as `sample` and `pixels` take them."""
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(images.noises_per_image, count, *images.denoiser.shape, generator=rng)
    return noise, {} if images.labels is None else {"class_labels": images.labels[:count]}


# compiled -------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """The compiler with empty caches."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("sampler", "classes"),
    [
        pytest.param("ddim", None, marks=pytest.mark.slow),  # by default in the next test
        ("ancestral", 3),
        pytest.param("heun", 3, marks=pytest.mark.slow),
        ("dpmpp_2m", 3),
    ],
)
def test_traced_as_one_graph_it_draws_the_eager_images(compiler, denoisers, sampler, classes):
    generator = ImageGenerator(denoisers[classes], 4, steps=3, sampler=sampler)
    inputs = inputs_of(generator, 4)

    def both(*inputs):
        x0 = generator.sample(*inputs)
        return x0, *to_pixels(x0)

    with torch.inference_mode():
        x0 = generator.sample(*inputs)
        traced, pixels, finite = torch.compile(both, backend="eager", fullgraph=True)(*inputs)
    assert x0.dtype == traced.dtype == torch.float32 and x0.std() > 0.1
    assert (traced - x0).abs().max() <= 1e-5
    shades = ((x0 / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
    assert bool(finite) and pixels.dtype == torch.uint8
    assert (pixels.float() - shades).abs().max() <= 0.501


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "sampler", ["ddim", *(pytest.param(s, marks=pytest.mark.slow) for s in SAMPLERS[1:])]
)
def test_mode_compile_with_a_last_batch_that_is_smaller(compiler, denoisers, monkeypatch, sampler):
    """Traced only, since code generation takes minutes; every batch that runs has the full size."""
    real, shapes = torch.compile, set()

    def traced(function, **options):
        compiled = real(function, **{**options, "backend": "eager"})

        def call(*inputs):
            shapes.add(inputs[0].shape[1])
            return compiled(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", traced)
    options = {"steps": 2, "sampler": sampler, "seed": 6, "batch_size": 4}
    one, other = (
        np.concatenate([batch.numpy() for batch in generate(denoisers[3], 10, mode=mode, **options)])
        for mode in ("eager", "compile")
    )
    assert shapes == {4} and one.shape == (10, 8, 8, 1)
    far = np.abs(one.astype(int) - other.astype(int))
    assert far.max() <= 1 and (far > 0).mean() < 1e-2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_for_the_processor(compiler, denoisers):
    options = {"steps": 2, "seed": 6, "batch_size": 4}
    one, other = (
        np.concatenate([batch.numpy() for batch in generate(denoisers[None], 6, mode=mode, **options)])
        for mode in ("eager", "compile")
    )
    far = np.abs(one.astype(int) - other.astype(int))
    assert one.std() > 10 and far.max() <= 1 and (far > 0).mean() < 1e-2


def test_invalid_modes(denoisers):
    for mode, words in (("graph", "CUDA graph"), ("", "auto, eager, graph, compile"), ("Eager", "unknown")):
        with pytest.raises(UserError, match=words):
            ImageGenerator(denoisers[None], 2, steps=1, mode=mode)
        with pytest.raises(UserError, match=words):
            next(generate(denoisers[None], 2, steps=1, mode=mode))


# memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "most", "fits"),
    [(64, 64, 64), (64, 63, 32), (64, 5, 4), (7, 3, 3), (7, 2, 1), (1, 1, 1), (48, 0, 0)],
)
def test_the_largest_batch_that_fits_by_halving(batch, most, fits):
    tried = []

    def run(count):
        tried.append(count)
        if count > most:
            raise torch.OutOfMemoryError(f"a batch of {count}")

    assert cuda_graphs.largest_fitting(run, batch) == fits
    assert tried == [batch >> k for k in range(len(tried))] and tried[-1] == max(fits, 1)


def test_other_errors_are_raised():
    def run(count):
        raise RuntimeError("a kernel that is broken")

    with pytest.raises(RuntimeError, match="broken"):
        cuda_graphs.largest_fitting(run, 8)


@pytest.mark.parametrize(("most", "words"), [(9, "8"), (1, "1"), (0, "nor does one image")])
def test_a_batch_that_does_not_fit_names_one_that_does(denoisers, monkeypatch, cli, most, words):
    real = cuda_graphs.prepare

    def prepare(function, inputs, *args, **kwargs):
        if max(x.shape[axis] for axis, x in ((1, inputs[0]), (0, inputs[1]))) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return real(function, inputs, *args, **kwargs)

    monkeypatch.setattr(cuda_graphs, "prepare", prepare)
    generator = ImageGenerator(denoisers[3], 100, steps=1, batch_size=64)
    for _ in range(2):  # it does not fit the second time either
        with pytest.raises(UserError, match=r"a batch of 64 images does not fit") as refused:
            generator.prepare()
        assert words in str(refused.value).split("fit into", 1)[1]
    with pytest.raises(UserError, match="64 images"):
        next(generate(denoisers[3], 100, steps=1, batch_size=64))
    if most:
        assert len(next(generate(denoisers[3], 100, steps=1, batch_size=int(words)))) == int(words)


def test_a_batch_that_does_not_fit_is_refused_in_one_line(cli, tmp_path, make_pipeline, monkeypatch):

    def prepare(function, inputs, *args, **kwargs):
        if inputs[0].shape[1] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return cuda_graphs.Runner(function, "eager")

    model = make_pipeline(tmp_path)
    args = ["sample", model, "-n", 60, "--steps", 1, "--out", tmp_path / "drawn"]
    assert cli(*args).code == 0
    monkeypatch.setattr(cuda_graphs, "prepare", prepare)
    line = refuse(cli, tmp_path, *args, "--seed", 5, "--overwrite", says=["a batch of 60 images", "memory"])
    assert "use a batch size of 7" in line
    assert cli(*args, "--seed", 5, "--overwrite", "--batch-size", 7).code == 0
