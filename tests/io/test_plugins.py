"""User code by name: where it is found, what it may be called, what the errors say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from diffkd import methods
from diffkd.errors import UserError
from diffkd.io import plugins
from diffkd.metrics import features
from diffkd.runs import config_files
from diffkd.runs.classification.networks import Network
from diffkd.runs.config import Distill
from diffkd.runs.method_config import method_name
from tests.runs import tiny

METHOD = """
from diffkd.methods.base import Method, Stage
class Mine(Method):
    reference = "none"
    strength: float = 1.0
    def stages(self, start): return [Stage("mine", 1, 1e-3, steps=2)]
    def losses(self, nets, batch, step, rng): yield from ()
"""
NETWORK = """
import torch
class _Block(torch.nn.Module):
    pass
class Pooled(torch.nn.Module):
    num_features = 3
    def __init__(self, **ignored):
        super().__init__()
        self.classify = torch.nn.Linear(3, 10)
    def forward(self, images): return images.float().mean((2, 3)).expand(-1, 3)
"""


def network(name: str) -> Network:
    return Network.model_construct(name=name, arguments={})


KINDS = {  # how each kind of user code is opened by its name
    "method": (METHOD, methods.find, "Mine"),
    "feature network": (NETWORK, lambda name: type(features.load(name)), "Pooled"),
    "network": (NETWORK, lambda name: type(network(name)._imported()), "Pooled"),
}


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Two folders, the config's and the current one; names are read as in a config."""
    for name in ("config", "current"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "current")
    with plugins.beside(tmp_path / "config"):
        yield tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["config", "current"])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("own_code.py", "own_code"),
        ("own_code.py", "./own_code.py"),
        ("own_code.py", "own_code.{}"),
        ("own-code.py", "own-code"),
        ("lab/__init__.py", "lab"),
        ("lab/own_code.py", "lab.own_code"),  # with no __init__.py
        ("lab/own_code.py", "lab.own_code.{}"),
        ("lab/own_code.py", "lab/own_code.py"),
    ],
)
def test_own_code_is_found_without_a_python_path(beside, kind, place, file, name):
    source, find, title = KINDS[kind]
    path = beside / place / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    found = find(name.format(title))
    assert found.__name__ == title
    assert Path(sys.modules[found.__module__].__file__) == path


def test_the_folder_of_the_config_comes_first(beside):
    for place in ("config", "current"):
        (beside / place / "own_code.py").write_text(METHOD.replace("none", place))
    assert methods.find("own_code").reference == "config"


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_tried_is_said(beside, kind):
    _, find, _ = KINDS[kind]
    with pytest.raises(UserError) as error:
        find("own_cod")
    assert f"{kind} 'own_cod' is unknown; use " in str(error.value)
    assert f"neither installed nor in {beside / 'config'} or {beside / 'current'}" in str(error.value)
    with pytest.raises(UserError, match=f"no file {beside}/config/own.py or {beside}/current/own.py"):
        find("./own.py")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", ".", "..x", "a..b", "own code", "x\0y", "a" * 5000, "%s", "os/", "é.ü"])
def test_a_name_of_nothing(beside, kind, name):
    with pytest.raises(UserError) as error:
        KINDS[kind][1](name)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import torch\nx = 1 / 0\n", "ZeroDivisionError: division by zero ({}, line 2)"),
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package' ({}, line 1)"),
        ("def f(:\n", "SyntaxError: invalid syntax ({}, line 1)"),
        ("import sys\n\nsys.exit(3)\n", "SystemExit: 3 ({}, line 3)"),
        ("import torch\ntorch.zeros(2) @ torch.zeros(3)\n", "line 2)"),
        ("from helper import nothing\n", "cannot import name 'nothing' from 'helper'"),
        ("raise KeyError\n", "failed with KeyError ({}, line 1)"),
    ],
)
def test_a_failure_inside_the_import_is_shown(beside, kind, code, says):
    path = beside / "config" / "own_code.py"
    path.write_text(code)
    (beside / "config" / "helper.py").write_text("")
    with pytest.raises(UserError) as error:
        KINDS[kind][1]("own_code")
    assert str(error.value).startswith(f"{kind} 'own_code': its import failed with ")
    assert says.format(path) in str(error.value)


@pytest.mark.parametrize("kind", ["feature network", "network"])
def test_a_failure_to_make_it_is_shown_with_its_line(beside, kind):
    path = beside / "config" / "own_code.py"
    path.write_text(NETWORK.replace("torch.nn.Linear(3, 10)", "torch.nn.Linear(3, 'ten')"))
    with pytest.raises(UserError, match=rf"cannot be made: TypeError: .* \({path}, line 9\)"):
        KINDS[kind][1]("own_code")


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_defines_none_or_several(beside, kind):
    source, find, title = KINDS[kind]
    (beside / "config" / "none.py").write_text("class Mine: pass\n")
    with pytest.raises(UserError, match=r"none \(.*none.py\) defines none, a subclass of "):
        find("none")
    (beside / "config" / "two.py").write_text(source + source.replace(title, "Other"))
    with pytest.raises(UserError, match=rf"defines several \({title}, Other\); name one, as two.Other"):
        find("two")
    assert find("two.Other").__name__ == "Other"
    with pytest.raises(UserError, match=rf"has no Third; it has {title}, Other"):
        find("two.Third")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["random", "json", "torch", "yaml", "sys"])
def test_nothing_installed_is_shadowed(beside, kind, name):
    source, find, _ = KINDS[kind]
    for place in ("config", "current"):
        (beside / place / f"{name}.py").write_text(source)
    for named in (name, f"./{name}.py", f"{name}.Mine"):
        with pytest.raises(UserError, match=f"{name}.py has the name of another module, .*; rename it"):
            find(named)
    assert name not in plugins.homes


@pytest.mark.parametrize(
    ("kind", "builtin"), [("method", "progressive"), ("feature network", "clip"), ("network", "cnn")]
)
def test_a_file_called_as_one_of_diffkds_own(beside, kind, builtin):
    source, find, title = KINDS[kind]
    (beside / "config" / f"{builtin}.py").write_text(source)
    with pytest.raises(UserError, match="has the name of one of diffkd's own; rename it"):
        find(f"./{builtin}.py")
    if kind == "method":
        assert find(builtin).__module__ == "diffkd.methods.progressive"


def test_a_folder_of_images_is_no_package(beside):
    """Own code beside it is found, and `import datasets` fails as it does without the folder."""
    for place in ("config", "current"):
        (beside / place / "no_such_package").mkdir()
    (beside / "config" / "own_code.py").write_text(METHOD)
    methods.find("own_code")
    with pytest.raises(ModuleNotFoundError):
        __import__("no_such_package")


def test_own_code_imports_what_lies_beside_it_whenever(beside):
    (beside / "config" / "helper_of_own.py").write_text("VALUE = 3\n")
    late = NETWORK.replace("return images", "import helper_of_own; return helper_of_own.VALUE * images")
    (beside / "config" / "own_code.py").write_text(late)
    network = features.load("own_code")
    assert network(torch.ones(1, 1, 2, 2, dtype=torch.uint8)).tolist() == [[3, 3, 3]]


def test_in_a_current_folder_that_was_removed(beside):
    (beside / "config" / "own_code.py").write_text(METHOD)
    (beside / "current").rmdir()
    assert methods.find("own_code").__name__ == "Mine"
    with pytest.raises(UserError, match="there is no file .*/config/other.py; give another name"):
        methods.find("./other.py")


def test_two_configs_with_code_of_the_same_name(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "own_code.py").write_text(METHOD)
    with plugins.beside(tmp_path / "one"):
        methods.find("own_code")
    with plugins.beside(tmp_path / "two"), pytest.raises(UserError, match="name of another module, .*one"):
        methods.find("own_code")


@pytest.mark.parametrize("name", ["own_code", "./own_code.py", "own_code.Mine"])
def test_a_config_names_a_method_in_one_way(tmp_path, monkeypatch, name):
    """Whatever the current folder, and as often as it is written and read."""
    (tmp_path / "own_code.py").write_text(METHOD)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    content = {**tiny.CONFIG, "method": {"name": name, "strength": 0.5}}
    once = config_files.resolved(config_files.load_distill(tiny.write(tmp_path / "run.yaml", content)))
    assert once["method"] == [{"name": "own_code", "strength": 0.5}]
    again = config_files.load(tiny.write(tmp_path / "again.yaml", once), Distill)
    assert config_files.resolved(again) == once


def test_a_method_of_a_module_that_holds_several_keeps_its_class(beside):
    (beside / "config" / "two.py").write_text(METHOD + METHOD.replace("Mine", "Other"))
    assert method_name(methods.find("two.Other")()) == "two.Other"


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        ("images @ images.new_zeros(7)", "fails on images of shape (2, 1, 8, 8): RuntimeError: "),
        ("images.float().mean((2, 3))", "gives (2, 1) for images of shape (2, 1, 8, 8); it must give"),
        ("(images, images)", "gives tuple for images"),
    ],
)
def test_features_that_fail_when_they_are_called(beside, gives, says):
    source = NETWORK.replace("return images.float().mean((2, 3)).expand(-1, 3)", f"return {gives}")
    (beside / "config" / "own_code.py").write_text(source)
    with pytest.raises(UserError) as error:
        features.load("own_code")(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["own_code", "./own_code.py", "own_code.Pooled"])
def test_a_protocol_names_features_in_one_way(beside, name):
    (beside / "config" / "own_code.py").write_text(NETWORK)
    network = features.load(name)
    assert features.describe(name, network)["name"] == "own_code.Pooled"
    assert isinstance(network, nn.Module)


def test_a_name_in_a_saved_model_binds_nothing(tmp_path, monkeypatch):
    """Only a config's names are looked for: those of any other file may not be the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_code.py").write_text(NETWORK)
    assert Network(name="own_code").name == "own_code"
    assert not plugins.homes
