"""Two processes that share one engine: what it writes for each, what it says of it, a sync, and
what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import spawn
from tiny import packed_logps, save_model
from torch.distributed.tensor import DTensor

from codistill import distributed
from codistill.config.machinery import TrainingConfig
from codistill.engine import Engine, EngineSpec, Sampling, cut_at_end, make_engine
from codistill.model.loading import load_policy
from codistill.model.policy import Policy

ROWS, VOCAB, END = 101, 90, 1  # of 128 rows vLLM gives each process 64, the last of them padding
PROMPTS = [[3, 12, 4, 13], [85, 12, 70, 13], [9, 66], [5, 89]]
GREEDY, RANDOM = Sampling(1, 0.0, 10), Sampling(4, 0.7, 10)
CPU = torch.device("cpu")


def written(engine: Engine, sampling: Sampling, shares: tuple[slice, slice]) -> list:
    """What the engine writes for PROMPTS when each process asks for its own share of them; each
    checks that it gets the completions of its own prompts."""
    mine, seeds = PROMPTS[shares[dist.get_rank()]], list(range(4))[shares[dist.get_rank()]]
    completions = engine.generate(mine, seeds, sampling)
    assert len(completions) == len(mine) * sampling.num_generations
    return sum(distributed.gathered(completions, dist.group.WORLD), [])


def check_agreement(engine: Engine, policy: Policy) -> None:
    """Engine and trainer write the same greedy completions, and say the same of sampled ones,
    whichever process asks."""
    shares = slice(0, 3), slice(3, 4)
    zeros = np.zeros((len(PROMPTS), GREEDY.max_tokens))
    ours, _ = policy.sample(PROMPTS, zeros, 0.0, (END,))
    expected = [cut_at_end(tokens, (END,))[0] for tokens in ours]
    assert [c.token_ids for c in written(engine, GREEDY, shares)] == expected
    completions = written(engine, RANDOM, shares)
    assert written(engine, RANDOM, (slice(0, 0), slice(0, 4))) == completions
    tokens = [c.token_ids for c in completions]
    assert max(map(max, tokens)) >= 64 and len(set(map(tuple, tokens))) > 12
    prompts = [prompt for prompt in PROMPTS for _ in range(RANDOM.num_generations)]
    logps = packed_logps(policy, prompts, tokens, RANDOM.temperature)
    policy.release()
    theirs = torch.tensor([logp for c in completions for logp in c.logps])
    assert (logps - theirs).abs().max() < 1e-4


def change(policy: Policy) -> None:
    """Other weights, the same on both processes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        assert isinstance(parameter, DTensor)
        parameter.data.add_(torch.distributed.tensor.distribute_tensor(noise, parameter.device_mesh, parameter.placements))


def check_shared_engine(rank: int, folder: str) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # the group is there already
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for name in ("tied", "untied"):
        path = f"{folder}/{name}"
        spec = EngineSpec(path, VOCAB, (END,), 20, torch.float32, CPU, 0.05, tensor_parallel=2)
        engine = make_engine("vllm", spec)
        policy = load_policy("small.path", path, TrainingConfig(dtype="float32"), VOCAB, CPU)
        assert engine.generate([], [], GREEDY) == []
        check_agreement(engine, policy)
        change(policy)
        engine.sync(policy.full_weights())
        check_agreement(engine, policy)
    engine.close()


def test_a_shared_engine_writes_what_the_trainer_would(tokenizer, tmp_path):
    """With a head that is the embedding and with one that is not."""
    pytest.importorskip("vllm", reason="vLLM cannot be installed on this machine")
    for seed, name in enumerate(("tied", "untied")):
        terms = dict(hidden=64, rows=ROWS, seed=seed, tied=name == "tied")
        save_model(tmp_path / name, tokenizer, **terms)
    spawn(check_shared_engine, str(tmp_path), processes=2)
