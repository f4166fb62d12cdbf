"""Versions of what is installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

NOT_INSTALLED = "not installed"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The version of every package, or `NOT_INSTALLED`: a source tree that was not installed has none either."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = NOT_INSTALLED
    return versions
