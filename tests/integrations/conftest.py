import pytest
import torch


@pytest.fixture
def single_thread():
    """Threads that wait for each other take longer than what they compute here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
