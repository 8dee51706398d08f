"""How often a step waits for its device: reads of its numbers by the host, in codistill/."""

import collections
import sys
from pathlib import Path

import torch
from tiny import FakeGrader
from torch.overrides import TorchFunctionMode

import codistill

FOLDER = str(Path(codistill.__file__).parent)
# What these hold is on the host anyway.
ON_HOST = ("batch.py", "attention.py", "rollout.py", "rewards.py")
ENGINE = "policy.py:sample"  # vLLM's is none of ours
TENSOR = torch.Tensor
READS = {
    *(TENSOR.item, TENSOR.tolist, TENSOR.cpu, TENSOR.numpy, TENSOR.nonzero),
    *(TENSOR.__bool__, TENSOR.__float__, TENSOR.__int__, TENSOR.__index__),
}


class Reads(TorchFunctionMode):
    """Counts reads by the line of codistill/ that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.places: collections.Counter[str] = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in READS:
            code = sys._getframe(1).f_code
            name = Path(code.co_filename).name
            if code.co_filename.startswith(FOLDER) and name not in ON_HOST:
                self.places[f"{name}:{code.co_name}"] += 1
        return function(*args, **kwargs or {})


def reads_of_a_step(trainer) -> collections.Counter[str]:
    with Reads() as reads:
        trainer.step(1)
    del reads.places[ENGINE]
    return reads.places


def test_a_step_reads_the_device_a_fixed_number_of_times(make_trainer):
    """Whatever the number of micro-batches, and few times."""
    one = reads_of_a_step(make_trainer({}, FakeGrader()))
    many = {"training": {"tokens_per_micro_batch": 16}}
    assert reads_of_a_step(make_trainer(many, FakeGrader())) == one
    assert one == {
        "distributed.py:totals": 1,  # of gradings, which are on the host
        "distributed.py:largest": 6,  # equal numbers of batches: twice packed, twice trained on
        "scoring.py:check_numbers": 1,  # whether the models' log-probabilities are finite
        "scoring.py:check_gap": 1,
        "trainer.py:score": 1,  # which are kept
        "learner.py:step": 2,  # whether a gradient is finite
        "metrics.py:reduce": 4,
    }
