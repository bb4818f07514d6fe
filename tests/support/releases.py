"""Which releases of other packages are installed."""

from importlib.metadata import version

from packaging.requirements import Requirement


def has(requirement: str) -> bool:
    """Tell whether the installed release of a package satisfies a requirement, such as ``lightning>=2.6``."""
    parsed = Requirement(requirement)
    return parsed.specifier.contains(version(parsed.name), prereleases=True)
