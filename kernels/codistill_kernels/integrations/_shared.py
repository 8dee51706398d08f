"""Functions that several integrations share."""

from contextlib import ExitStack
from importlib import metadata

import torch
from torch import Tensor


def require_version(package: str, series: str) -> None:
    """Raise ImportError unless `package` is installed in a version of this series, like "1.16"."""
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        found = "none"
    if found != series and not found.startswith(series + "."):
        raise ImportError(f"codistill_kernels needs {package} {series}.*, found {found}")


def replace(patch: ExitStack, owner: object, name: str, value: object) -> None:
    """owner.name = value, until `patch` is closed."""
    if name in vars(owner):
        patch.callback(setattr, owner, name, vars(owner)[name])
    else:  # the attribute belongs to the class
        patch.callback(delattr, owner, name)
    setattr(owner, name, value)


def autocast_operands(hidden_states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that autocast gives the operands of a product; as they are if it is off.

    The kernels sum in fp32 and never round a logit, so this changes speed and the operands'
    rounding alone.
    """
    device = hidden_states.device.type
    if not torch.is_autocast_enabled(device):
        return hidden_states, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden_states.to(dtype), weight.to(dtype)
