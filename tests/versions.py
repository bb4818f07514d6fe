"""Runs the tests with sets of versions, and prints the README's table of supported versions.

    python -m tests.versions                            # the lowest and the newest set
    python -m tests.versions torch-2.6 -- tests/optim   # one set, and arguments of pytest

Each set is installed into ``.versions/``, where an environment that is already there is used as it is. pip is
configured as always: with an index of torch for the CPU, another torch is a smaller download.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".versions"
HEADER = [
    "| Set | Python | torch | Lightning | Other packages | Passed | Failed | Skipped |",
    "|---|---|---|---|---|---:|---:|---:|",
]


@dataclass(frozen=True)
class VersionSet:
    """A version of Python, a file of constraints, and what replaces some of its lines."""

    python: str = "3.11"
    constraints: str = "constraints.txt"
    pins: dict[str, str] = field(default_factory=dict)

    def versions(self) -> dict[str, str]:
        """The version of each package."""
        lines = (ROOT / self.constraints).read_text().splitlines()
        return dict(line.split("==") for line in lines if "==" in line) | self.pins


SETS = {
    "lowest": VersionSet(constraints="constraints-lowest.txt"),
    "newest": VersionSet(),
    "torch-2.6": VersionSet(pins={"torch": "2.6.0", "triton": "3.2.0"}),
    "torch-2.14": VersionSet(pins={"torch": "2.14.1", "triton": "3.8.0"}),
    "python-3.12": VersionSet("3.12", pins={"triton": "3.7.1"}),
    "python-3.13": VersionSet("3.13", pins={"triton": "3.7.1"}),
}


def installed(name: str) -> Path:
    """Install a set, unless it is installed, and return its Python.

    Raises:
        OSError: If there is no such Python.
        subprocess.CalledProcessError: If it has no venv, or a package cannot be installed.
    """
    folder, chosen = FOLDER / name, SETS[name]
    python = folder / "bin" / "python"
    if folder.exists():
        return python
    FOLDER.mkdir(exist_ok=True)
    constraints = FOLDER / f"{name}.txt"
    constraints.write_text("".join(f"{each}=={version}\n" for each, version in chosen.versions().items()))
    # What is imported is compiled then: most is not.
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", constraints, "-e", ".[test]"]
    try:
        subprocess.run([f"python{chosen.python}", "-m", "venv", folder], check=True)
        subprocess.run(install, cwd=ROOT, check=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return python


def results(name: str, arguments: list[str]) -> tuple[int, int, int] | None:
    """Run the tests with a set, and return how many passed, failed and were skipped.

    Return None if the set cannot be installed.
    """
    try:
        python = installed(name)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{name} is not run: {error}", file=sys.stderr)
        return None
    report = FOLDER / f"{name}.xml"
    report.unlink(missing_ok=True)
    subprocess.run([python, "-m", "pytest", f"--junit-xml={report}", *arguments], cwd=ROOT, check=False)
    return counted(report.read_text())


def counted(report: str) -> tuple[int, int, int]:
    """Return how many tests passed, failed and were skipped, from pytest's report in the format of JUnit."""
    (suite,) = ElementTree.fromstring(report).iter("testsuite")
    keys = ("tests", "failures", "errors", "skipped")
    total, failures, errors, skipped = (int(suite.attrib[key]) for key in keys)
    return total - failures - errors - skipped, failures + errors, skipped


def row(name: str, counts: tuple[int, int, int] | None) -> str:
    """Return the row of a set in the table."""
    chosen = SETS[name]
    versions = chosen.versions()
    cells = [f"`{name}`", chosen.python, versions["torch"], versions["lightning"], f"`{chosen.constraints}`"]
    return f"| {' | '.join(cells + ([f'{each:,}' for each in counts] if counts else ['not run', '', '']))} |"


def main() -> int:
    """Run the chosen sets, print the table, and return 1 unless all tests of all sets passed."""
    given, arguments = sys.argv[1:], ["-n", "auto"]
    if "--" in given:
        given, arguments = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m tests.versions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sets", nargs="*", metavar="SET", help=", ".join(SETS))
    chosen = parser.parse_args(given).sets or ["lowest", "newest"]
    if unknown := set(chosen) - set(SETS):
        parser.error(f"no such sets: {', '.join(sorted(unknown))}")
    all_counts = {name: results(name, arguments) for name in chosen}
    print("\n".join(["", *HEADER, *(row(name, counts) for name, counts in all_counts.items())]))
    return 0 if all(counts and counts[0] and not counts[1] for counts in all_counts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
