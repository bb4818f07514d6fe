"""The supported versions of pyproject.toml, constraints, README and workflow are those that are tested."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tests import versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETS = versions.SETS
# The lowest torch has a set of its own. torchao is tested with the newest alone.
OTHERWISE = {"torch": "torch-2.6", "torchao": None}


def requirements():
    """What the package and the extras for its users need."""
    extras = [
        line
        for extra in ("8bit", "cli", "examples", "plot")
        for line in PROJECT["optional-dependencies"][extra]
    ]
    parsed = map(Requirement, [*PROJECT["dependencies"], *extras])
    return [each for each in parsed if each.name != "lightning-lars"]


def lowest(requirement):
    (bound,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
    return bound


def test_the_lowest_set_has_the_lowest_versions_that_are_accepted():
    for requirement in requirements():
        name = OTHERWISE.get(requirement.name, "lowest")
        if name is not None:
            assert Version(SETS[name].versions()[requirement.name]) == lowest(requirement), requirement


def test_every_set_is_accepted():
    for name, chosen in SETS.items():
        for requirement in requirements():
            version = chosen.versions().get(requirement.name)
            assert version is None or version in requirement.specifier, (name, requirement)
        assert f"Programming Language :: Python :: {chosen.python}" in PROJECT["classifiers"]


def test_releases_of_lightning_that_were_compromised_are_refused():
    for requirement in requirements():
        if requirement.name in ("lightning", "pytorch-lightning"):
            releases = ("2.6.1", "2.6.2", "2.6.3", "2.6.6")
            assert [each for each in releases if each in requirement.specifier] == ["2.6.1", "2.6.6"]


def test_the_readme_has_a_row_for_every_set_and_the_workflow_runs_it():
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(versions.HEADER) in readme
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    for name, chosen in SETS.items():
        assert versions.row(name, (0, 0, 0)).split("| 0 |")[0] in readme
        assert name == "newest" or f'{{ set: {name}, python: "{chosen.python}" }}' in workflow


def test_errors_count_as_failures_and_neither_they_nor_skips_as_passed():
    attributes = 'name="pytest" errors="1" failures="2" skipped="4" tests="15" time="0.1"'
    report = f"<?xml version='1.0'?><testsuites><testsuite {attributes} /></testsuites>"
    assert versions.counted(report) == (8, 3, 4)
    assert versions.row("newest", (8, 3, 4)).endswith("| 8 | 3 | 4 |")
    assert "| not run |" in versions.row("newest", None)
