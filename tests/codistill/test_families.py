"""Each family of models: the trainer and both engines compute what transformers computes."""

import pytest
import torch
from families import FAMILIES, save_family
from plain_step import CPU, TEMPERATURE, VOCAB, batch_of, objective, plain_logps, plain_loss
from processes import spawn
from tiny import packed_logps

from codistill import distributed
from codistill.config import ConfigError
from codistill.config.machinery import OptimizerConfig, TrainingConfig
from codistill.engine import EngineSpec, Sampling, make_engine
from codistill.learner import Learner
from codistill.model.loading import load_causal_lm, load_policy
from codistill.model.policy import Policy
from codistill.output.metrics import StepMetrics
from codistill_kernels import PolicyLoss

RATE, DECAY = 1e-2, 0.1
OPTIONS = TrainingConfig(dtype="float32")
PROMPTS = [[3, 12, 4, 13], [5, 12, 5, 13], [9, 13]]
WITH_VLLM = ("qwen3", "mistral, window", "gemma 2, softcaps", "granite, logit scale")


def make_learner(policy: Policy) -> Learner:
    constant = OptimizerConfig(schedule="constant", warmup_fraction=0, weight_decay=DECAY)
    return Learner("small", policy, PolicyLoss(), constant, learning_rate=RATE, total_steps=1)


def take_step(policy: Policy) -> None:
    """One optimizer step, on two packed batches."""
    learner, metrics = make_learner(policy), StepMetrics(CPU)
    batches = [batch_of([0, 1, 2, 3]), batch_of([4, 5, 6, 7])]
    learner.backward(batches, objective(), metrics, temperature=TEMPERATURE)
    learner.step(metrics)
    policy.release()


def assert_stepped(weights: dict, lm: torch.nn.Module) -> None:
    """The weights are those of a model in float64 after a step of plain PyTorch."""
    before = {name: weight.detach().clone() for name, weight in lm.named_parameters()}
    optimizer = torch.optim.AdamW(lm.parameters(), lr=RATE, weight_decay=DECAY)
    plain_loss(lm).backward()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    optimizer.step()
    assert weights.keys() == before.keys()
    sure, count = 0, 0
    for name, weight in lm.named_parameters():
        # Adam divides by the gradient's size: the sign of one that is all rounding is chance.
        is_sure = (weight.grad.abs() > 1e-6) | (weight.grad == 0)
        sure, count = sure + int(is_sure.sum()), count + weight.numel()
        step, expected = (each.double() - before[name] for each in (weights[name], weight.detach()))
        assert expected.abs().max() > RATE / 2, name
        assert (step - expected)[is_sure].abs().max() < 0.02 * RATE, name
        assert (step - expected).abs().max() < 2.1 * RATE, name
    assert sure > 0.95 * count


def engine_gap(engine, policy: Policy) -> float:
    """Largest difference between engine and trainer on freshly sampled tokens (nats)."""
    sampling = Sampling(num_generations=4, temperature=TEMPERATURE, max_tokens=12)
    completions = engine.generate(PROMPTS, [1, 2, 3], sampling)
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    ours = packed_logps(policy, prompts, [c.token_ids for c in completions], TEMPERATURE)
    policy.release()
    theirs = torch.tensor([logp for c in completions for logp in c.logps])
    return (ours - theirs).abs().max().item()


def check_engine(kind: str, path: str) -> None:
    """An engine knows the weights on disk, and those after a step once it has got them."""
    spec = EngineSpec(path, VOCAB, (), 20, torch.float32, CPU, kv_cache_gib=0.05)
    engine = make_engine(kind, spec)
    policy = load_policy("small.path", path, OPTIONS, VOCAB, CPU)
    assert engine_gap(engine, policy) < 1e-4
    take_step(policy)
    assert engine_gap(engine, policy) > 1e-3
    engine.sync(policy.full_weights())
    assert engine_gap(engine, policy) < 1e-4
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_a_step_are_those_of_transformers(tmp_path, process_group, family):
    path = str(save_family(tmp_path, family))
    policy = load_policy("small.path", path, OPTIONS, VOCAB, CPU)
    lm = load_causal_lm(path, dtype=torch.float64)
    lm.set_attn_implementation("eager")
    with torch.no_grad():
        ours = torch.cat([policy(batch_of([row]), TEMPERATURE) for row in range(8)])
        theirs = torch.cat(plain_logps(lm))
        packed = policy(batch_of(list(range(8))), TEMPERATURE)
    assert (ours - theirs).abs().max() < 2e-5
    by_length = torch.cat(plain_logps(lm)[::-1])
    assert (packed - by_length).abs().max() < 2e-5
    policy.release()
    take_step(policy)
    assert_stepped(dict(policy.full_weights()), lm)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_hf_agrees(tmp_path, process_group, family):
    check_engine("hf", str(save_family(tmp_path, family)))


def check_vllm(rank: int, paths: list[str], foreign: str) -> None:
    distributed.start(timeout=60)
    for path in paths:
        check_engine("vllm", path)
    terms = (foreign, VOCAB, (), 20, torch.float32, CPU, 0.05)
    spec = EngineSpec(*terms, section="")
    with pytest.raises(ConfigError, match="^engine = 'vllm': expected hf: .* PhiForCausalLM"):
        make_engine("vllm", spec)


def test_vllm_agrees(tmp_path):
    """In one process, as most of the time is vLLM's start. Phi it runs by transformers' code."""
    pytest.importorskip("vllm", reason="vLLM cannot be installed on this machine")
    paths = [str(save_family(tmp_path / family, family)) for family in WITH_VLLM]
    spawn(check_vllm, paths, str(save_family(tmp_path / "phi", "phi, bias")), processes=1)
