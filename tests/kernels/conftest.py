import pytest
import torch
from numerics import DEVICE


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield
