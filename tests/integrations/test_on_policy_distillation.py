"""The example of on-policy distillation against plain PyTorch with all logits."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "on_policy_distillation.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("on_policy_distillation", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with small models several threads only wait for each other
    yield module
    torch.set_num_threads(threads)


def with_all_logits(student, teacher, mask, kind):
    """The loss as TRL computes it: beta 0 is the forward KL, 1 the reverse KL, 0.5 the JSD."""
    log_p, log_q = (
        (states @ weight.T)[..., :200].log_softmax(-1) for states, weight, _ in (student, teacher)
    )

    def kl(log_a, log_b):
        return torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if kind == "jsd":
        log_m = torch.logsumexp(torch.stack((log_p, log_q)), dim=0) - torch.tensor(2.0).log()
        values = (kl(log_q, log_m) + kl(log_p, log_m)) / 2
    else:
        values = kl(log_p, log_q) if kind == "reverse_kl" else kl(log_q, log_p)
    return values[mask].sum() / mask.sum()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_losses_are_those_of_all_logits(example, kind):
    losses = example.train(kind, steps=20)
    expected = example.train(kind, steps=20, loss_of=with_all_logits)
    assert losses == pytest.approx(expected, rel=0, abs=1e-4)
    assert losses[-1] < 0.9 * losses[0]


def test_mask_ends_with_the_first_end_of_sequence(example):
    ids = torch.full((2, example.PROMPT + example.COMPLETION), 7)
    ids[0, example.PROMPT + 3] = ids[0, example.PROMPT + 5] = example.EOS
    assert example.completion_mask(ids).sum(1).tolist() == [4, example.COMPLETION]


def test_command_runs():
    command = [sys.executable, str(FILE), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nats per token") == 2
