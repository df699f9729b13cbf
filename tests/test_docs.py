"""What the docs name exists: functions, files, links, commands, and the tests behind each promise."""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from itertools import product
from pathlib import Path

import pytest
import typer
import yaml

import diffkd
from tests.test_imports import ROOMS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SCRIPTS = sorted(path for path in ROOT.glob("scripts/**/*") if path.is_file() and path.suffix != ".pyc")
FOLDERS = ("diffkd", "docs", "tests", "scripts", "configs")
EXTRA = {"slow", "exhaustive"}  # marks of tests that only `scripts/test --all` runs


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def slug(heading: str) -> str:
    """The anchor that a heading gets on the usual hosts."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def expand(path: str) -> list[str]:
    """`a/{b,c}.py` -> `a/b.py`, `a/c.py`."""
    parts = [part.split(",") for part in re.split(r"[{}]", path)]
    return ["".join(choice) for choice in product(*parts)]


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:index]))
            except ModuleNotFoundError:
                return False
        found = getattr(found, part)
    return True


def test_dotted_names_resolve():
    wrong = []
    for page in PAGES:
        named = set(re.findall(r"(?<![\w/-])diffkd(?:\.[A-Za-z_]\w*)+(?!/)", text(page))) - {"diffkd.json"}
        written = {one for one in named if f"{one.replace('.', '/')}.py" in text(page)}  # by the reader
        wrong += [f"{name(page)}: {one}" for one in sorted(named - written) if not resolves(one)]
    assert not wrong, "\n".join(wrong)


def test_paths_exist():
    """Paths from the repository's root. Pages on contributing may name files that the reader will write."""
    wrong = []
    for page in PAGES:
        for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./{{}},*-]*[\w}}/]", text(page)):
            for one in expand(path):
                planned = page.parent.name == "contributing" or "NAME" in one
                if not any(ROOT.glob(one.rstrip("/"))) and not (planned and (ROOT / one).parent.is_dir()):
                    wrong.append(f"{name(page)}: {one}")
    assert not wrong, "\n".join(wrong)


def test_files_that_scripts_name_exist():
    """With an ending, wherever they say or run them, but for what scripts/new_method writes."""
    wrong = []
    for script in SCRIPTS:
        for path in re.findall(rf"(?<![\w./{{}}-])(?:{'|'.join(FOLDERS)})/[\w./-]+\.[a-z]\w*", text(script)):
            planned = "NAME" in path or (script.name == "new_method" and (ROOT / path).parent.is_dir())
            if not planned and not (ROOT / path).exists():
                wrong.append(f"{name(script)}: {path}")
    assert len(SCRIPTS) > 40 and not wrong, "\n".join(wrong)


def test_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        prose = re.sub(r"^(`{3,}).*?^\1$", "", text(page), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            headings = (
                re.findall(r"^#+ (.+)$", text(target), re.MULTILINE) if target.is_file() and anchor else []
            )
            if not target.exists() or (anchor and anchor not in map(slug, headings)):
                wrong.append(f"{name(page)}: {link}")
    assert not wrong, "\n".join(wrong)


def test_every_page_can_be_reached_from_the_readme():
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for link in re.findall(r"\]\(([^)#\s]+)", text(page)):
            target = (page.parent / link).resolve()
            pages = target.glob("*.md") if target.is_dir() else [target] if target.suffix == ".md" else []
            waiting += [one for one in pages if one.is_file() and one not in reached]
    assert [name(page) for page in PAGES if page not in reached] == []


def test_commands_have_these_options():
    from diffkd.cli.app import app

    commands = typer.main.get_command(app).commands
    wrong = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", text(page), re.DOTALL):
            for called, rest in re.findall(
                r"(?:^|-m )diffkd(?:\.cli)? +([a-z]\w*)([^#\n]*)", block, re.MULTILINE
            ):
                known = {one for parameter in commands[called].params for one in parameter.opts}
                given = re.findall(r"(?<!\S)--?[a-z][\w-]*", rest)
                wrong += [f"{name(page)}: {called} {one}" for one in given if one not in known]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```yaml" in text(p) and p.parent.name != "contributing"], ids=name
)
def test_configs_are_valid(page, tmp_path, cli):
    """Each example is a config of `diffkd distill`, or a part of one."""
    rest = {
        "out": "runs/x",
        "teacher": {"path": "x"},
        "data": {"kind": "digits"},
        "method": {"name": "output"},
    }
    for index, block in enumerate(re.findall(r"```yaml\n(.*?)```", text(page), re.DOTALL)):
        config = tmp_path / f"{index}.yaml"
        config.write_text(yaml.safe_dump(rest | yaml.safe_load(block)), encoding="utf-8")
        code, _, stderr = cli("distill", config, "--dry-run")
        assert (code, stderr) == (0, "")


def test_the_citation_is_of_this_version():
    assert yaml.safe_load(text(ROOT / "CITATION.cff"))["version"] == diffkd.__version__


def test_the_readme_is_short_and_shows_the_rooms_in_order():
    lines = text(ROOT / "README.md").splitlines()
    assert len(lines) <= 150
    shown = [found[1] for line in lines if (found := re.match(r"diffkd/(\w+)/ ", line))]
    assert shown == [room for room in ROOMS if room != "errors"]


def definitions(path: str) -> dict[str, ast.AST]:
    """The functions of a test file, and the values of its names."""
    body = ast.parse(text(ROOT / path)).body
    functions: dict[str, ast.AST] = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    return functions | {target.id: node.value for node in body if isinstance(node, ast.Assign)
                        for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip


def marks(test: str) -> tuple[set[str], set[str]]:
    """Marks of EXTRA on every case of a test, and on some of its cases."""
    path, _, function = test.partition("::")
    defined = definitions(path)

    def named(node: ast.AST, seen: frozenset[str] = frozenset()) -> set[str]:
        """Of an expression, and of what it names in the same file: lists of cases, helpers."""
        words = {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)}
        names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} & defined.keys() - seen
        return (EXTRA & words).union(*(named(defined[one], seen | names) for one in names))

    decorators = defined[function].decorator_list
    whole = [one for one in decorators if isinstance(one, ast.Attribute)]
    whole += [defined[one] for one in ("pytestmark",) if one in defined]
    return set().union(*map(named, whole)), set().union(*map(named, [*decorators, *whole]))


def promises() -> list[tuple[str, list[str], list[str]]]:
    """The rows of docs/reliability.md: promise, tests that always run, tests that `--all` adds."""
    rows = [line.strip("|").split(" | ") for line in text(ROOT / "docs/reliability.md").splitlines()
            if "::test_" in line]  # fmt: skip
    return [
        (cells[0].strip(), *(re.findall(r"`(tests/\S+::\w+)", cell) for cell in cells[1:3])) for cells in rows
    ]


def test_the_tests_behind_promises_exist():
    wrong = []
    for test in sorted({test for _, *columns in promises() for column in columns for test in column}):
        path, _, function = test.partition("::")
        known = definitions(path) if (ROOT / path).is_file() else {}
        if function not in known:
            wrong.append(f"{test}: nearest {difflib.get_close_matches(function, known, n=1, cutoff=0.4)}")
    assert not wrong, "\n".join(wrong)


def test_every_promise_has_a_test_that_runs_by_default():
    assert len(promises()) >= 8
    for promise, default, extra in promises():
        assert default, promise
        assert [test for test in default if marks(test)[0]] == [], f"runs only with --all: {promise}"
        assert [test for test in extra if not marks(test)[1]] == [], f"runs by default: {promise}"


@pytest.mark.parametrize(
    ("dotted", "expected"),
    [
        ("diffkd.load", True),
        ("diffkd.core.samplers.ddim_step", True),
        ("diffkd.schedules.Schedule.cosine", True),
        ("diffkd.engine", False),
        ("diffkd.core.samplers.nothing", False),
    ],
)
def test_names_that_are_gone_are_seen(dotted, expected):
    assert resolves(dotted) is expected
