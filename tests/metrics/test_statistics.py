"""Means and covariances beside NumPy's: in any batches, from any parts, over processes, through files."""

from __future__ import annotations

import gc
import json
import pickle
import threading
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from diffkd.errors import UserError
from diffkd.io.npz import read_npz
from diffkd.metrics.frechet import distance, frechet_distance
from diffkd.metrics.statistics import Statistics


def rng_of(*seed: int) -> np.random.Generator:
    return np.random.default_rng([21, *seed])


def features(n: int, d: int, *seed: int) -> np.ndarray:
    rng = rng_of(n, d, *seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3 * rng.standard_normal(d)


def of(*parts: np.ndarray) -> Statistics:
    made = Statistics()
    for part in parts:
        made.update(torch.from_numpy(part))
    return made


def split(x: np.ndarray, rng: np.random.Generator, pieces: int) -> list[np.ndarray]:
    """Pieces of any size, some of them empty."""
    return np.split(x, np.sort(rng.integers(0, len(x) + 1, pieces - 1)))


def same(statistics: Statistics, x: np.ndarray, rel: float = 1e-11) -> None:
    """As NumPy has it, within `rel` of the standard deviations."""
    mu, sigma = x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])
    scale = sigma.diagonal().max() + 1e-300
    assert statistics.num_samples == len(x) and statistics.num_features == x.shape[1]
    assert statistics.mu.dtype == statistics.sigma.dtype == torch.float64
    np.testing.assert_allclose(statistics.mu, mu, rtol=rel, atol=rel * scale**0.5)
    np.testing.assert_allclose(statistics.sigma, sigma, rtol=0, atol=rel * scale)


@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 5), (3, 8), (50, 3), (200, 17)])
def test_in_batches_of_any_size(n, d):
    x = features(n, d)
    rng = rng_of(1, n, d)
    same(of(x), x)
    same(of(*x[:, None]), x)  # one by one
    for pieces in (2, 3, 7, 20):
        same(of(*split(x, rng, pieces)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_features_of_any_precision_are_summed_in_double(dtype):
    x = torch.from_numpy(features(300, 6)).to(dtype)
    made = Statistics()
    for batch in x.split(37):
        made.update(batch)
    same(made, x.double().numpy())


def test_features_with_a_gradient_are_taken_and_left_alone():
    x = torch.from_numpy(features(20, 4)).requires_grad_()
    before = x.detach().clone()
    made = Statistics()
    made.update(x)
    made.update(x)
    same(made, np.concatenate([before, before]))
    assert torch.equal(x.detach(), before) and not made.mu.requires_grad


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("n", "d"), [(2, 3), (5, 5), (120, 9)])
def test_any_parts_merge_into_the_whole(n, d, seed):
    x = features(n, d)
    rng = rng_of(2, n, d, seed)
    parts = [of(*split(part, rng, 3)) for part in split(x, rng, 6)]
    while len(parts) > 1:  # in any order of merging, neighbours alone
        i = int(rng.integers(len(parts) - 1))
        parts[i].merge(parts.pop(i + 1))
    same(parts[0], x)


def test_the_order_of_parts_does_not_matter_and_others_stay_as_they_are():
    x = features(60, 5)
    one, two, three = of(x[40:]), of(x[:13]), of(x[13:40])
    before = two.mu.clone(), two.sigma.clone()
    one.merge(two)
    one.merge(three)
    one.merge(Statistics())
    same(one, x)
    same(two, x[:13])
    assert torch.equal(before[0], two.mu) and torch.equal(before[1], two.sigma)


def test_more_after_a_merge():
    x = features(60, 5)
    one = Statistics()
    one.merge(of(x[:20]))
    one.update(torch.from_numpy(x[20:31]))
    one.merge(of(x[31:32]))
    one.update(torch.from_numpy(x[32:]))
    same(one, x)


def test_a_merge_into_nothing_does_not_tie_the_two_together():
    x = features(30, 4)
    one, two = Statistics(), of(x[:20])
    one.merge(two)
    one.update(torch.from_numpy(x[20:]))
    same(one, x)
    same(two, x[:20])


def test_merged_with_itself_counts_twice():
    x = features(30, 4)
    one = of(x)
    one.merge(one)
    same(one, np.concatenate([x, x]))


def far(n: int, d: int, *seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of mean 1e6 and standard deviation 1, and the same less 1e6, which is exact."""
    x = 1e6 + rng_of(n, d, *seed).standard_normal((n, d))
    return x, x - 1e6


def test_a_million_far_from_the_origin():
    x, near = far(1_000_000, 4)
    for size in (10_000, 333_333):
        made = of(*(x[i : i + size] for i in range(0, len(x), size)))
        sigma = np.cov(near, rowvar=False)
        np.testing.assert_allclose(made.sigma, sigma, rtol=0, atol=1e-9)
        np.testing.assert_allclose(made.mu - 1e6, near.mean(0), rtol=0, atol=1e-9)


def test_far_from_the_origin_in_parts():
    x, near = far(20_000, 3)
    parts = [of(part) for part in split(x, rng_of(3), 9)]
    whole = Statistics()
    for part in parts:
        whole.merge(part)
    np.testing.assert_allclose(whole.sigma, np.cov(near, rowvar=False), rtol=0, atol=1e-9)
    np.testing.assert_allclose(whole.mu - 1e6, near.mean(0), rtol=0, atol=1e-9)


def test_a_first_image_unlike_the_rest():
    """The first batch must not set a scale that later ones are lost in."""
    near = rng_of(4).standard_normal((50_000, 3))
    x = np.concatenate([np.full((1, 3), -1e4), near])
    expected = np.cov(x, rowvar=False)
    made = of(*np.split(x, [1, 20_000]))
    np.testing.assert_allclose(made.sigma, expected, rtol=1e-9)
    about = of(x[1:2], x[2:])
    np.testing.assert_allclose(about.sigma, np.cov(near, rowvar=False), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gap", [1e3, 1e8])
def test_means_that_lie_far_apart(gap):
    rng = rng_of(5)
    x, y = rng.standard_normal((400, 3)) - gap, 2 * rng.standard_normal((70, 3)) + gap
    whole = of(x)
    whole.merge(of(y))
    # about the middle: within the two, and between them
    dx, dy = x.mean(0), y.mean(0)
    between = np.outer(dx - dy, dx - dy) * (400 * 70 / 470)
    expected = (399 * np.cov(x, rowvar=False) + 69 * np.cov(y, rowvar=False) + between) / 469
    np.testing.assert_allclose(whole.sigma, expected, rtol=1e-12)
    np.testing.assert_allclose(whole.mu, (400 * dx + 70 * dy) / 470, rtol=1e-12)


# over processes


def in_processes(
    members: Sequence[object], call: Callable[[object, Callable[[Tensor], Tensor]], None]
) -> None:
    """Runs call(member, add) for all of them at once, `add` being a sum over them, as all_reduce is.

    As in all_reduce, shapes and types must be the same everywhere, all must call it equally often, and the
    tensor given is written over.
    """
    barrier = threading.Barrier(len(members))
    given: list[Tensor] = [torch.empty(0)] * len(members)
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        def add(tensor: Tensor) -> Tensor:
            given[rank] = tensor.clone()
            barrier.wait(30)
            assert len({(g.shape, g.dtype) for g in given}) == 1, given
            total = torch.stack(given).sum(0)
            barrier.wait(30)
            tensor.copy_(total)
            return total

        try:
            call(members[rank], add)
        except BaseException as failure:
            failures.append(failure)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    genuine = [f for f in failures if not isinstance(f, threading.BrokenBarrierError)]
    if failures:
        raise (genuine or failures)[0]


@pytest.mark.parametrize(
    "sizes", [[30], [30, 30], [1, 59], [0, 60], [60, 0], [0, 0, 2], [1, 1], [7, 0, 0, 13, 1, 40]]
)
def test_over_processes(sizes):
    x = features(sum(sizes), 6)
    members = []
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        member = Statistics(6)
        for batch in torch.from_numpy(part).split(8):
            member.update(batch)
        members.append(member)
    in_processes(members, lambda member, add: member.merge_across(add))
    for member in members:
        same(member, x)
        assert torch.equal(member.mu, members[0].mu) and torch.equal(member.sigma, members[0].sigma)


def test_over_processes_far_from_the_origin():
    x, near = far(9_000, 3, 1)
    members = [Statistics(3) for _ in range(4)]
    for member, part in zip(members, np.split(x, [1, 4000, 4000]), strict=True):  # one image, and none
        member.update(torch.from_numpy(part))
    in_processes(members, lambda member, add: member.merge_across(add))
    for member in members:
        np.testing.assert_allclose(member.sigma, np.cov(near, rowvar=False), rtol=0, atol=1e-9)
        np.testing.assert_allclose(member.mu - 1e6, near.mean(0), rtol=0, atol=2e-9)


def test_over_processes_without_any_samples():
    members = [Statistics(3), Statistics(3)]
    in_processes(members, lambda member, add: member.merge_across(add))
    for member in members:
        assert member.num_samples == 0
        with pytest.raises(UserError, match="at least 2"):
            member.mu  # noqa: B018


def test_what_differs_between_processes_as_torchmetrics_divides_by():
    """One process takes many, another few: the sums, not the means, are what adds up."""
    x = np.concatenate([np.zeros((99, 2)), np.full((1, 2), 10.0)])
    members = [Statistics(2), Statistics(2)]
    members[0].update(torch.from_numpy(x[:99]))
    members[1].update(torch.from_numpy(x[99:]))
    in_processes(members, lambda member, add: member.merge_across(add))
    np.testing.assert_allclose(members[1].mu, [0.1, 0.1], rtol=1e-14)
    np.testing.assert_allclose(members[1].sigma, np.full((2, 2), 1.0), rtol=1e-14)


# beside torchmetrics


class Identity(nn.Module):
    num_features = 24

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(("n", "m"), [(300, 500), (40, 1000)])
def test_the_distance_is_torchmetrics(n, m):
    x, y = features(n, 24, 1), features(m, 24, 2)
    metric = FrechetInceptionDistance(feature=Identity())
    for batch in torch.from_numpy(x).split(64):
        metric.update(batch, real=True)
    for batch in torch.from_numpy(y).split(64):
        metric.update(batch, real=False)
    ours = distance(of(x[:10], x[10:]).gaussian(), of(y).gaussian())
    assert ours == pytest.approx(float(metric.compute()), rel=1e-8)
    one, two = of(x), of(y)
    assert frechet_distance(one.mu, one.sigma, two.mu, two.sigma) == pytest.approx(ours, rel=1e-11)


# files


@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 4), (3, 9), (7, 4), (50, 33), (50_000, 8), (1797, 16)])
def test_a_round_trip_changes_no_bit(tmp_path, n, d):
    made = of(features(n, d))
    made.save(tmp_path / "a.npz")
    read = Statistics.load(tmp_path / "a.npz")
    assert read.num_samples == n
    assert torch.equal(read.mu, made.mu)
    assert torch.equal(read.sigma, made.sigma)
    read.save(tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert np.array_equal(a["mu"], b["mu"]) and np.array_equal(a["sigma"], b["sigma"])


def test_a_file_merges_and_takes_more(tmp_path):
    x = features(90, 5)
    of(x[:40]).save(tmp_path / "a.npz")
    read = Statistics.load(tmp_path / "a.npz")
    read.update(torch.from_numpy(x[40:50]))
    read.merge(of(x[50:]))
    same(read, x)
    again = of(x[40:])
    again.merge(Statistics.load(tmp_path / "a.npz"))
    same(again, x)


def test_a_file_is_what_pytorch_fid_reads(tmp_path):
    x = features(40, 7)
    protocol = {"features": {"name": "inception"}, "count": 40, "none": None}
    of(x).save(
        str(tmp_path / "a.npz"),
        protocol=protocol,
        labels=torch.arange(40),
        features=x.astype(np.float32),
        gone=None,
    )
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert set(file.files) == {"mu", "sigma", "num_samples", "protocol", "labels", "features"}
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        assert file["mu"].shape == (7,) and file["sigma"].shape == (7, 7)
        np.testing.assert_allclose(file["mu"], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
        assert int(file["num_samples"]) == 40
        assert json.loads(str(file["protocol"])) == protocol
        assert np.array_equal(file["labels"], np.arange(40))
    same(Statistics.load(tmp_path / "a.npz"), x)


def write(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("dtype", ["<f8", "<f4", ">f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_file_of_others(tmp_path, dtype, order):
    """mu and sigma alone, of either precision, byte order and layout: as from other tools and machines."""
    x = features(40, 7)
    mu, sigma = x.mean(0).astype(dtype), np.asarray(np.cov(x, rowvar=False), dtype=dtype, order=order)
    read = Statistics.load(write(tmp_path / "a.npz", mu=mu, sigma=sigma))
    assert read.num_samples is None and read.num_features == 7
    assert read.mu.dtype == read.sigma.dtype == torch.float64
    assert np.array_equal(read.mu, mu.astype(np.float64))
    np.testing.assert_allclose(read.sigma, sigma.astype(np.float64), rtol=1e-15, atol=0)
    read.save(tmp_path / "b.npz")
    again = Statistics.load(tmp_path / "b.npz")
    assert again.num_samples is None and torch.equal(again.sigma, read.sigma)


def test_a_compressed_file_of_others(tmp_path):
    x = features(40, 7)
    np.savez_compressed(tmp_path / "a.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    assert np.array_equal(Statistics.load(tmp_path / "a.npz").mu, x.mean(0))


def test_adms_file(tmp_path):
    """Images, and statistics of two feature networks."""
    x = features(40, 7)
    path = write(
        tmp_path / "a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8),
        mu=x.mean(0), sigma=np.cov(x, rowvar=False), mu_s=np.zeros(9), sigma_s=np.eye(9),
    )  # fmt: skip
    read = Statistics.load(path)
    assert read.num_samples is None and np.array_equal(read.mu, x.mean(0))


def test_an_unknown_number_of_samples_does_not_grow(tmp_path):
    x = torch.from_numpy(features(10, 3))
    read = Statistics.load(write(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3)))
    for grow in (
        lambda: read.update(x),
        lambda: read.merge(of(x.numpy())),
        lambda: of(x.numpy()).merge(read),
        lambda: Statistics().merge(read),
    ):
        with pytest.raises(UserError, match="unknown number"):
            grow()
    assert torch.equal(read.sigma, torch.eye(3, dtype=torch.float64))


def test_a_file_beside_the_features(tmp_path):
    """A distance through files is the one without."""
    x, y = features(30, 40, 1), features(60, 40, 2)
    of(x).save(tmp_path / "x.npz")
    of(y).save(tmp_path / "y.npz")
    a, b = (Statistics.load(tmp_path / name).gaussian() for name in ("x.npz", "y.npz"))
    assert distance(a, b) == pytest.approx(distance(of(x).gaussian(), of(y).gaussian()), rel=1e-12)
    assert distance(a, of(x).gaussian()) <= 1e-9 * float(a.trace)


EYE = np.eye(3)
NAN, INF = np.diag([1, np.nan, 1]), np.diag([1, np.inf, 1])


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "mu"),
        ({"mu": np.zeros(3)}, "sigma"),
        ({"sigma": EYE}, "mu"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "arr_0"),
        ({"mu": np.zeros(3), "sigma": NAN}, "finite"),
        ({"mu": np.zeros(3), "sigma": INF}, "finite"),
        ({"mu": np.array([0, np.nan, 0]), "sigma": EYE}, "finite"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "symmetric"),
        ({"mu": np.zeros(4), "sigma": EYE}, r"\(4,\)"),
        ({"mu": np.zeros((1, 3)), "sigma": EYE}, r"\(1, 3\)"),
        ({"mu": np.zeros(3), "sigma": np.ones(3)}, r"\(3,\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"\(0,\)"),
        ({"mu": np.float64(1), "sigma": np.float64(1)}, r"\(\)"),
        ({"mu": np.array(["a", "b", "c"]), "sigma": EYE}, "mu"),
        ({"mu": np.zeros(3, [("x", "f8")]), "sigma": EYE}, "mu"),
        ({"mu": np.zeros(3, complex), "sigma": EYE}, "mu"),
        ({"mu": np.zeros(3), "sigma": EYE, "num_samples": np.asarray(1)}, "num_samples"),
        ({"mu": np.zeros(3), "sigma": EYE, "num_samples": np.asarray(-5)}, "num_samples"),
        ({"mu": np.zeros(3), "sigma": EYE, "num_samples": np.asarray("many")}, "num_samples"),
        ({"mu": np.zeros(3), "sigma": EYE, "num_samples": np.arange(5)}, "num_samples"),
        ({"mu": np.array([0, None, 0], object), "sigma": EYE}, "pickle"),
        ({"mu": np.zeros(3), "sigma": EYE, "more": np.array([{}], object)}, "pickle"),
    ],
)
def test_a_file_that_is_none(tmp_path, arrays, says):
    path = write(tmp_path / "odd.npz", **arrays)
    refused(path, says)


def refused(path: Path, says: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a test of its own
        with pytest.raises(UserError, match=says) as error:
            Statistics.load(path)
        said = str(error.value)
        del error
        gc.collect()
    assert path.name in said and "\n" not in said


def good(path: Path, compressed: bool = False) -> bytes:
    x = rng_of(9).standard_normal((400, 40))
    (np.savez_compressed if compressed else np.savez)(path, mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".PKL", ".pt"])
def test_a_pickle_is_not_opened(tmp_path, suffix):
    path = tmp_path / f"ref{suffix}"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    path.write_bytes(pickle.dumps({"fid": Bomb()}))
    refused(path, r"pickle.*savez.*mu.*sigma")
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_by_another_name_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (tmp_path / "ref.npz").write_bytes(pickle.dumps({"mu": Bomb()}))
    refused(tmp_path / "ref.npz", "cannot be read")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_cut_short(tmp_path, kept, compressed):
    path = tmp_path / "cut.npz"
    content = good(path, compressed)
    path.write_bytes(content[: int(kept * len(content))])
    refused(path, "cannot be read")


def test_a_broken_file_is_closed_again(tmp_path):
    path = tmp_path / "cut.npz"
    path.write_bytes(good(path)[:5000])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(UserError):
            Statistics.load(path)
        gc.collect()
    assert [str(w.message) for w in seen] == []


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_with_bytes_turned(tmp_path, compressed):
    """In the middle of the data, where the list of contents is whole."""
    path = tmp_path / "turned.npz"
    content = bytearray(good(path, compressed))
    for start in range(2000, 4000, 7):
        content[start] ^= 0xFF
    path.write_bytes(content)
    refused(path, "cannot be read")


def test_a_single_array_by_that_name(tmp_path):
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.eye(3))
    refused(tmp_path / "one.npz", "single array|cannot be read")


def test_a_single_array(tmp_path):
    np.save(tmp_path / "one.npy", np.eye(3))
    refused(tmp_path / "one.npy", "single array|cannot be read")


def test_a_text_by_that_name(tmp_path):
    (tmp_path / "text.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:6726825d\n")
    refused(tmp_path / "text.npz", "cannot be read")


def test_an_archive_of_other_things(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("mu", "one")
        archive.writestr("sigma", "two")
    refused(tmp_path / "zip.npz", "mu|cannot be read")


def test_a_note_beside_the_arrays_is_harmless(tmp_path):
    good(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("README.txt", "hello")
    assert Statistics.load(tmp_path / "a.npz").num_features == 40


def test_a_file_that_is_not_there(tmp_path):
    refused(tmp_path / "absent.npz", "does not exist")


def test_a_folder_by_that_name(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    refused(tmp_path / "folder.npz", "cannot be read")


def test_every_array_of_a_file(tmp_path):
    arrays = {"a": np.arange(3), "b": np.ones((2, 2), np.uint8), "arr_0": np.array(["x", "yz"])}
    read = read_npz(str(write(tmp_path / "a.npz", **arrays)))
    assert set(read) == set(arrays)
    for key, array in arrays.items():
        assert np.array_equal(read[key], array) and read[key].dtype == array.dtype


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_samples_are_not_saved(tmp_path, n):
    made = Statistics(3)
    made.update(torch.zeros(n, 3))
    with pytest.raises(UserError, match="at least 2") as error:
        made.save(tmp_path / "a.npz")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="at least 2"):
        made.gaussian()
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_npz(tmp_path):
    with pytest.raises(UserError, match="npz"):
        of(features(5, 2)).save(tmp_path / "stats.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), ()])
def test_features_of_other_shapes(shape):
    with pytest.raises(UserError, match="batch") as error:
        Statistics().update(torch.zeros(shape))
    assert "\n" not in str(error.value)


def test_other_numbers_of_features():
    made = of(features(5, 3))
    with pytest.raises(UserError, match="4.*3"):
        made.update(torch.zeros(2, 4))
    with pytest.raises(UserError, match="3.*4"):
        made.merge(of(features(5, 4)))
    same(made, features(5, 3))


def test_a_number_of_features_that_was_announced():
    with pytest.raises(UserError, match="4.*3|3.*4"):
        Statistics(4).update(torch.zeros(5, 3))


def test_features_that_are_not_finite():
    x = features(5, 3)
    x[2, 1] = np.nan
    with pytest.raises(UserError, match="set A.*finite"):
        of(x).gaussian("set A")


def test_known_moments():
    mu, sigma = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    for count in (None, 2, 17):
        made = Statistics.of(mu, sigma, count)
        assert made.num_samples == count
        assert np.array_equal(made.mu, mu)
        np.testing.assert_allclose(made.sigma, sigma, rtol=1e-15)
    with pytest.raises(UserError, match="set B"):
        Statistics.of(mu, np.eye(2), name="set B")
