"""scripts/gpu_check: every part is heard, whatever becomes of the others; what was asked is met or missed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
from checking import plan, verdicts  # noqa: E402
from checking.running import Part, check  # noqa: E402

SAMPLING = """name of the machine
| network | batch | path | network alone, images/s | in memory | ratio | npz | png | stock | over stock |
|---|---|---|---|---|---|---|---|---|---|
| digits (0.65 M) | 1 | graph | 900.0 | 880.0 | 0.978 |  |  | 0.300 | 3.260 |
| digits (0.65 M) | 1 | eager | 900.0 | 500.0 | 0.556 |  |  | 0.300 | 1.853 |
| digits (0.65 M) | 256 | graph | 900.0 | 880.0 | 0.978 |  |  | 0.900 | 1.087 |
| middle (6.47 M) | 16 | graph | 900.0 | 801.0 | 0.890 |  |  | 0.440 | 2.023 |
| middle (6.47 M) | 256 | gra"""
TRAINING = """| method | network | batch | precision | our update | the minimum | ratio | peak memory, GB |
|---|---|---|---|---|---|---|---|
| progressive | digits (0.65 M) | 1 | bf16 | 9.0 ms | 8.0 ms | 1.125 | 1.2 |
| progressive | digits (0.65 M) | 16 | bf16 | 9.0 ms | 8.9 ms | 1.011 | 1.2 |
"""


def shell(title, script, seconds=60.0, **options):
    return Part(title, ["sh", "-c", script], seconds, str.strip, **options)


def test_a_part_that_fails_or_is_cut_is_named_and_the_next_goes_on(tmp_path):
    """The section is written after each part; a child that a part has started ends with it."""
    kept, said, child = [], [], tmp_path / "child"
    parts = [
        shell("First", "echo one"),
        shell("Broken", "echo until here; echo no such thing >&2; exit 3"),
        shell("Long", f"sleep 600 & echo $! > {child}; echo half; wait", 1.5),
        shell("Enough", "echo row; sleep 600", 1.5, partial=True),
        Part("Elsewhere", [], 1.0, str, absent="not on a CPU"),
        shell("Last", "echo end"),
    ]
    assert check(parts, "## Head", 60.0, kept.append, said.append) is False
    whole = kept[-1]
    assert kept[0] == "## Head" and len(kept) == len(parts) + 1
    assert all(longer.startswith(shorter) for shorter, longer in zip(kept, kept[1:], strict=False))
    assert "**It failed with exit status 3: no such thing.**\n\nuntil here" in whole
    assert "**It was cut after 2 s.**\n\nhalf" in whole
    assert "row\n\nThe rest was not measured: it was cut after 2 s." in whole
    assert "**Elsewhere**: not on a CPU." in whole and whole.endswith("end")
    assert [line for line in said if "..." not in line] == [
        "Broken: it failed with exit status 3: no such thing", "Long: it was cut after 2 s",
    ]  # fmt: skip
    status = Path(f"/proc/{child.read_text().strip()}/stat")
    assert not status.exists() or " Z " in status.read_text()
    assert check([shell("Fine", "echo 1")], "## Head", 60.0, kept.append, said.append) is True
    assert check([shell("Late", "echo 1")], "## Head", 0.0, kept.append, said.append) is False
    assert "**No time was left for it.**" in kept[-1]


def test_what_was_asked_is_met_or_missed():
    """By the captured rows alone, each batch size by its own number; a row that was cut does not count."""
    found = verdicts.sampling(SAMPLING, "cuda")
    assert found.startswith("| network | batch |") and "name of the machine" not in found
    assert "at least 0.95: **missed** by 1 of 3 (middle at 16 0.890)" in found
    assert "256: **missed** by 1 of 3 (digits at 256 1.087)" in found
    assert "at most 1.05: **missed** by 1 of 2 (digits at 1 1.125)" in verdicts.training(TRAINING, "cuda")
    better = TRAINING.replace("1.125", "1.049")
    assert "at most 1.05: **met** by all 2, 1.011 to 1.049" in verdicts.training(better, "cuda")
    assert verdicts.sampling("", "cuda").count("not measured") == 2
    assert "not on a CPU" in verdicts.training(TRAINING, "cpu")
    said = verdicts.tests(
        "..F\nFAILED tests/test_gpu.py::test_a - assert 1\n==== 1 failed, 2 passed in 3 s ====\n"
    )
    assert said == "`1 failed, 2 passed in 3 s`\n\n- FAILED tests/test_gpu.py::test_a - assert 1"


def test_the_whole_check_keeps_to_its_time():
    """And names files that there are."""
    for device, small in (("cuda", False), ("cpu", True)):
        parts = plan.parts(device, small, Path("x"))
        assert sum(part.seconds for part in parts) <= 60 * plan.MINUTES
        for part in parts:
            assert all((ROOT / word).exists() for word in part.command if word.endswith(".py"))
    assert "tests/test_gpu.py" in plan.gpu_tests()


@pytest.mark.slow
def test_on_a_cpu_all_that_it_can_run(tmp_path):
    command = [ROOT / "scripts/gpu_check", "--device", "cpu", "--small", "--minutes", "60", "--out"]
    command.append(tmp_path / "section.md")
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    section = (tmp_path / "section.md").read_text()
    assert done.returncode == 0, section + done.stderr
    assert section.strip() == done.stdout.strip()
    print(section)
    tables = [verdicts.rows(part) for part in section.split("\n**")]
    assert [len(rows) for rows in tables] == [0, 0, 2, 1, 3, 0]
    assert [row["path"] for row in tables[2]] == ["eager", "eager"]
    assert [row["model"] for row in tables[4]] == ["teacher", "student", "student"]
    assert all(float(row["FID"]) > 0 for row in tables[4])
    assert "**Tests of GPUs**: not on a CPU." in section and ", torch " in section.splitlines()[2]


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    command = [ROOT / "scripts/gpu_check", "--out", tmp_path / "section.md"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "gpu_check: error: there is no CUDA device that torch can use; try --device cpu --small"
    ]
