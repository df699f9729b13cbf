"""How a drawing is run: as it is, compiled, in batches that fit, with work ahead, by the clock."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

import diffkd
from diffkd.errors import UserError
from diffkd.generation import cuda_graphs
from diffkd.generation.drawing import Drawing, generate
from diffkd.generation.timing import Clock
from diffkd.io.prefetch import prefetch
from tests.refusals import refuse

SAMPLERS = ["ddim", "heun", "dpmpp_2m", "ancestral"]


@pytest.fixture(scope="module")
def denoisers(tmp_path_factory, make_pipeline):
    root = tmp_path_factory.mktemp("pipelines")
    return {n: diffkd.load(make_pipeline(root, name=str(n), classes=n)) for n in (None, 3)}


def given(drawing, count):
    """The inputs of one batch, as `denoise` and `pixels` take them."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(drawing.draws, count, *drawing.denoiser.shape, generator=generator)
    return noise, None if drawing.labels is None else drawing.labels[:count]


# compiled -------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """Its caches as nobody left them: warnings of the compiler are no errors here."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("sampler", "classes"),
    [
        ("ddim", None),
        ("ancestral", 3),
        pytest.param("heun", 3, marks=pytest.mark.slow),
        ("dpmpp_2m", 3),
    ],
)
def test_traced_whole_it_draws_the_eager_images(compiler, denoisers, sampler, classes):
    drawing = Drawing(denoisers[classes], 4, steps=3, sampler=sampler)
    inputs = given(drawing, 4)
    with torch.inference_mode():
        x0 = drawing.denoise(*inputs)
        whole = torch.compile(drawing.denoise, backend="eager", fullgraph=True)(*inputs)
        pixels, fine = torch.compile(drawing.pixels, backend="eager", fullgraph=True)(*inputs)
    assert x0.dtype == whole.dtype == torch.float32 and x0.std() > 0.1
    assert (whole - x0).abs().max() <= 1e-5
    shades = ((x0 / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
    assert bool(fine) and pixels.dtype == torch.uint8
    assert (pixels.float() - shades).abs().max() <= 0.501


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "sampler", ["ddim", *(pytest.param(s, marks=pytest.mark.slow) for s in SAMPLERS[1:])]
)
def test_mode_compile_with_a_last_batch_that_is_smaller(compiler, denoisers, monkeypatch, sampler):
    """Traced only, not translated, which takes minutes: the batches are those that are run."""
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


def test_modes_that_there_are_not(denoisers):
    for mode, words in (("graph", "CUDA graph"), ("", "auto, eager, graph, compile"), ("Eager", "unknown")):
        with pytest.raises(UserError, match=words):
            Drawing(denoisers[None], 2, steps=1, mode=mode)
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

    assert cuda_graphs.fitting(run, batch) == fits
    assert tried == [batch >> k for k in range(len(tried))] and tried[-1] == max(fits, 1)


def test_other_errors_are_no_lack_of_memory():
    def run(count):
        raise RuntimeError("a kernel that is broken")

    with pytest.raises(RuntimeError, match="broken"):
        cuda_graphs.fitting(run, 8)


@pytest.mark.parametrize(("most", "words"), [(9, "8"), (1, "1"), (0, "nor does one image")])
def test_a_batch_that_does_not_fit_names_one_that_does(denoisers, monkeypatch, cli, most, words):
    real = cuda_graphs.prepare

    def prepare(function, inputs, *args, **kwargs):
        if max(x.shape[axis] for axis, x in ((1, inputs[0]), (0, inputs[1]))) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return real(function, inputs, *args, **kwargs)

    monkeypatch.setattr(cuda_graphs, "prepare", prepare)
    drawing = Drawing(denoisers[3], 100, steps=1, batch_size=64)
    for _ in range(2):  # it does not fit the second time either
        with pytest.raises(UserError, match=r"a batch of 64 images does not fit") as refused:
            drawing.prepare()
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


# work ahead -----------------------------------------------------------------------------------------------


@pytest.fixture
def in_time():
    """in_time(function): what it returns, unless that takes ten seconds."""

    def run(function):
        found = []
        thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "it hangs"
        return found[0]

    return run


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_same_items_in_the_same_order(in_time, depth, count):
    assert in_time(lambda: list(prefetch(iter(range(count)), depth))) == list(range(count))
    falsy = [None, 0, "", [], False]
    assert in_time(lambda: list(prefetch(iter(falsy), depth))) == falsy


@pytest.mark.parametrize("place", [0, 1, 4])
def test_an_exception_comes_where_it_belongs(in_time, place):
    def items():
        yield from range(place)
        raise KeyError(place)

    def consume():
        found = []
        try:
            for item in prefetch(items()):
                time.sleep(0.01)  # the producer is past it by now
                found.append(item)
        except KeyError as error:
            return found, error.args
        return found, None

    assert in_time(consume) == (list(range(place)), (place,))


def test_a_consumer_that_stops_early_ends(in_time):
    before = threading.active_count()

    def consume():
        items = prefetch(itertools.count())
        found = [next(items), next(items)]
        items.close()
        for item in prefetch(itertools.count()):
            if item == 3:
                break
        return found

    assert in_time(consume) == [0, 1]
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize("depth", [1, 3])
def test_items_are_made_while_one_is_used(in_time, depth):
    made, enough = [], threading.Event()

    def items():
        for item in range(50):
            made.append(item)
            if len(made) == 1 + depth:
                enough.set()
            yield item

    def consume():
        found = prefetch(items(), depth)
        first = next(found)
        early = enough.wait(5)
        time.sleep(0.05)
        count = len(made)
        found.close()
        return first, early, count

    first, early, count = in_time(consume)
    assert first == 0 and early and count <= depth + 2  # ahead, but not without end


# the clock ------------------------------------------------------------------------------------------------


def test_times_of_the_host_add_up(monkeypatch):
    ticks = {"now": 100.0}
    monkeypatch.setattr(time, "perf_counter", lambda: ticks["now"])
    clock = Clock(torch.device("cpu"))
    for seconds in (1.5, 0.25, 2.0):
        with clock.host("writing"):
            ticks["now"] += seconds
        with clock.device("network"):
            ticks["now"] += 2 * seconds
        ticks["now"] += 0.125  # of nobody
    with pytest.raises(OSError), clock.host("writing"):
        ticks["now"] += 1
        raise OSError
    assert clock.seconds() == {"writing": 4.75, "network": 7.5} and clock.elapsed() == 12.625
    clock.seconds()["writing"] = 0.0
    assert clock.seconds()["writing"] == 4.75


def test_a_drawings_time_is_all_of_it(denoisers):
    drawing = Drawing(denoisers[None], 64, steps=8, batch_size=16)
    drawing.prepare()
    clock = drawing.clock = Clock(drawing.device)
    for _ in drawing.batches():
        pass
    spent = clock.seconds()
    assert {"noise", "network", "conversion"} <= spent.keys() and all(v > 0 for v in spent.values())
    assert 0.5 * clock.elapsed() < sum(spent.values()) <= clock.elapsed()
