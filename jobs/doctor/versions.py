"""Installed packages against the ranges that the project states, and between nodes."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from jobs.doctor.findings import Finding, fail, ok
from jobs.doctor.report import NodeReport

PROJECT = "flamingo-dist"
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
COMPARED = ("torch", "triton", "deepspeed", "megatron-core", "ray", "numpy", "transformers")
"""Packages whose versions must be the same on all nodes: processes pickle to one another and sum with one another."""


def requirements(pyproject: Path = PYPROJECT) -> list[Requirement]:
    """Return what the project requires: from the checkout that this code lies in, else from the installed package."""
    if pyproject.is_file():
        stated = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    else:
        stated = [
            text for text in metadata.requires(PROJECT) or [] if not re.search(r";.*\bextra\s*==", text)
        ]
    found = [Requirement(text) for text in stated]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def installed(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed, by name."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def check_versions(required: Sequence[Requirement], versions: Mapping[str, str]) -> list[Finding]:
    """Check installed versions against the stated ranges.

    Args:
        required: packages and ranges.
        versions: what is installed, by name.
    """
    wrong = []
    for each in required:
        version = versions.get(each.name)
        if version is None:
            wrong.append(f"{each.name} is missing (wanted {each.specifier or 'any version'})")
        # A local label (torch 2.13.0+cpu) is no other version.
        elif not each.specifier.contains(version.split("+")[0], prereleases=True):
            wrong.append(f"{each.name} {version} is outside {each.specifier}")
    if wrong:
        return [fail("versions", "; ".join(wrong), "make install (or pip install -e . in this environment)")]
    shown = ", ".join(f"{name} {versions[name]}" for name in COMPARED if name in versions)
    return [ok("versions", f"{len(required)} packages are within their ranges ({shown})")]


def check_same_versions(reports: Sequence[NodeReport]) -> list[Finding]:
    """Check that all nodes have the same versions."""
    if len(reports) < 2:
        return []
    names = sorted({name for report in reports for name in report.versions})
    differing = []
    for name in names:
        nodes: dict[str, list[str]] = {}
        for report in reports:
            nodes.setdefault(report.versions.get(name, "none"), []).append(report.node)
        if len(nodes) > 1:
            differing.append(f"{name} " + ", ".join(f"{v} on {' '.join(n)}" for v, n in nodes.items()))
    if differing:
        remedy = "use one environment on a file system that all nodes see (FLAMINGO_VENV)"
        return [fail("same versions", "; ".join(differing), remedy)]
    return [ok("same versions", f"{len(reports)} nodes agree")]
