"""Two processes that share one engine: what it writes for each, what it says of it, a sync, and
what is refused."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import spawn
from tiny import merged, packed_logps, save_model
from torch.distributed.tensor import distribute_tensor

from codistill import distributed
from codistill.config import Config, ConfigError
from codistill.config.evaluation import EvalOptions
from codistill.config.machinery import TrainingConfig
from codistill.engine import Engine, EngineSpec, Sampling, check_engine, cut_at_end, make_engine
from codistill.evaluation_run import engine_spec
from codistill.inputs import load_inputs
from codistill.model.loading import load_policy
from codistill.model.policy import Policy
from codistill.model.shape import check_split

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
    with torch.no_grad():
        for weight in policy.parameters():
            noise = 0.3 * torch.randn(weight.shape, generator=generator)
            weight.add_(distribute_tensor(noise, weight.device_mesh, weight.placements))


def check_shared_engine(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # the group is there already
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    from vllm.distributed import get_tp_group

    for name in ("tied", "untied"):
        path = f"{folder}/{name}"
        spec = EngineSpec(path, VOCAB, (END,), 20, torch.float32, CPU, 0.05, tensor_parallel=2)
        engine = make_engine("vllm", spec)
        # Not shared memory, which a run that is killed leaves to the next one.
        assert get_tp_group().device_communicator.dist_module is torch.distributed
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


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({"engine": "hf"}, "1 with engine hf, of which each process has its own"),
        ({"engine": "vllm"}, "a divisor of the 1 heads and the MLP's 64 columns of .*small, and a"),
    ],
    ids=["hf", "heads"],
)
def test_an_engine_that_cannot_be_shared(settings, monkeypatch, rollout, expected):
    monkeypatch.setattr("codistill.versions.has_vllm", lambda: True)
    config = Config(**merged(settings, {"rollout": rollout | {"tensor_parallel": 2}}))
    with pytest.raises(ConfigError, match=f"^rollout.tensor_parallel = 2: expected {expected}"):
        load_inputs(config)


def test_the_large_model_must_be_cut_by_the_server_that_evaluates_it(settings, monkeypatch):
    """The model of two heads writes; the other one has a head."""
    monkeypatch.setattr("codistill.versions.has_vllm", lambda: True)
    monkeypatch.setattr("codistill.inputs.has_gpu", lambda: True)
    small, large = settings["small"]["path"], settings["large"]["path"]
    changes = {
        "small": {"path": large},
        "large": {"path": small},
        "rollout": {"engine": "vllm", "tensor_parallel": 2},
    }
    expected = "^rollout.tensor_parallel = 2: expected a divisor of the 1 heads .* of .*small, and"
    with pytest.raises(ConfigError, match=expected):
        load_inputs(Config(**merged(settings, changes)))


@pytest.mark.parametrize(("parts", "fits"), [(2, True), (8, True), (3, False), (16, False)])
def test_key_heads_are_cut_or_copied(monkeypatch, parts, fits):
    text = SimpleNamespace(num_attention_heads=48, num_key_value_heads=4, intermediate_size=72)
    config = SimpleNamespace(get_text_config=lambda: text)
    monkeypatch.setattr("codistill.model.shape.load_model_config", lambda key, path: config)
    if fits:
        check_split("tensor_parallel", parts, "path")
    else:
        expected = "a divisor of the 48 heads and the MLP's 72 columns of path, and a divisor or a "
        with pytest.raises(ConfigError, match=f"^tensor_parallel = {parts}: expected {expected}"):
            check_split("tensor_parallel", parts, "path")


def test_processes_divide_over_engines(settings):
    config = Config(**merged(settings, {"rollout": {"tensor_parallel": 2}}))
    config.check_processes(4)
    with pytest.raises(ConfigError, match="^rollout.tensor_parallel = 2: expected a divisor of"):
        config.check_processes(3)


def test_eval_has_the_same_option(tmp_path):
    files = dict(model=["m"], data=["sums=s"], output=str(tmp_path))
    options = EvalOptions(**files, template="{problem}", tensor_parallel=2)
    with pytest.raises(ConfigError, match="^tensor_parallel = 2: expected a divisor of the 3 proc"):
        options.check_processes(3)
    with pytest.raises(ConfigError, match="^tensor_parallel = 2: expected 1 with engine hf"):
        check_engine("", "hf", 2)
    problem = SimpleNamespace(prompt_ids=[1])
    model = SimpleNamespace(path="m", tokenizer=[], end_token_ids=(1,), sets={"sums": [problem]})
    spec = engine_spec(options, model, CPU)
    assert spec.tensor_parallel == 2
    assert (spec.path_key, spec.section) == ("model", "")
