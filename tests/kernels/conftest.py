import pytest
import torch
from numerics import DEVICE, INTERPRETED


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    if INTERPRETED:  # small vocabularies and few tokens must have several slabs too
        from codistill_kernels import _slabs

        monkeypatch.setattr(_slabs, "SEGMENT", 512)
        monkeypatch.setattr(_slabs, "ROWS", 32)
        monkeypatch.setattr(_slabs, "ROW_PADDING", 16)
        monkeypatch.setattr(_slabs, "SLAB_BYTES", 4 * 32 * 512)
    with torch.device(DEVICE):
        yield
