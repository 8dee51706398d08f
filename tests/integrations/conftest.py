import pytest
import torch


@pytest.fixture
def single_thread():
    """One thread: with models this small, several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
