import pytest
import torch
from numerics import DEVICE, INTERPRETED


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    if INTERPRETED:  # small vocabularies must have several splits too
        from codistill_kernels import _linear_triton

        monkeypatch.setattr(_linear_triton, "TILES_PER_SPLIT", 2)
    with torch.device(DEVICE):
        yield
