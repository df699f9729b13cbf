"""The oldest versions that pyproject.toml names, and the set that the tests run with."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
bounds = runpy.run_path(str(ROOT / "scripts/bounds.py"))["bounds"]


def test_every_package_has_an_oldest_version_not_newer_than_the_one_in_use():
    oldest = bounds(["dev"])
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert {"torch", "typer", "scikit-learn", "torchao", "pytest"} <= oldest.keys()
    for name, version in oldest.items():
        if name in pinned:
            assert Version(version) <= Version(pinned[name]), name


def test_an_extra_raises_what_it_needs_newer():
    needs = {"build-system": {"requires": []}}
    needs["project"] = {
        "dependencies": ["torch>=2.6", "numpy>=1.26"],
        "optional-dependencies": {"quant": ["torch>=2.10"], "all": ["diffkd[quant]", "scipy>=1.9"]},
    }
    assert bounds([], needs) == {"torch": "2.6", "numpy": "1.26"}
    assert bounds(["all"], needs) == {"torch": "2.10", "numpy": "1.26", "scipy": "1.9"}


def test_a_package_without_an_oldest_version_is_refused():
    needs = {"build-system": {"requires": ["setuptools"]}, "project": {"dependencies": []}}
    needs["project"]["optional-dependencies"] = {}
    with pytest.raises(ValueError, match="setuptools"):
        bounds([], needs)
