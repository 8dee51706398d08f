"""Any split of the rollouts gives the same gradient: micro-batches, packing order, processes."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch.distributed.tensor import DTensor

from codistill.batch import Ragged, TokenBatch
from codistill.config.machinery import OptimizerConfig, TrainingConfig
from codistill.learner import Learner
from codistill.model.loading import load_causal_lm, load_policy
from codistill.model.policy import Policy, checkpoint_activations
from codistill.objective import Objective, Penalty
from codistill.output.metrics import StepMetrics
from codistill_kernels import PolicyLoss
from codistill_kernels._surrogates import SURROGATES

CPU = torch.device("cpu")
VOCAB, TEMPERATURE = 18, 0.9
PROMPTS = Ragged.of([[3, 12, 4, 13], [9, 13], [5], [7, 7, 2], [4, 12], [6, 2, 2, 12, 13]])
COMPLETIONS = Ragged.of([[2] * 9, [5, 1], [4] * 70, [3, 6, 1], [8], [2, 3, 4, 5, 6, 7, 1]])
ROLLOUTS = len(COMPLETIONS.lengths)
NORMALIZERS = ("constant", "sequence", "tokens")
WHOLE = [[2, 0, 5, 3, 1, 4]]
# of this process; then of two, the second of which has none in one of them
SPLITS = [[[2], [0], [5], [3], [1], [4]], [[2, 0], [5], [3, 4], [], [1]], [[4], [2, 1], [0, 5, 3]]]
SHARES = [
    [[[2, 0], [5, 1]], [[3], [4]]],
    [[[2, 0, 5], [3, 1, 4]], [[], []]],
]


def objective(normalization: str, kept: list[int], *, penalty: bool) -> Objective:
    """Random terms for the rollouts kept, float64."""
    generator = torch.Generator().manual_seed(0)
    tokens, lengths = len(COMPLETIONS.values), COMPLETIONS.lengths
    random = torch.rand(3, tokens, generator=generator, dtype=torch.float64)
    mask = random[0] > 0.2
    counted = torch.segment_reduce(mask.double(), "sum", lengths=lengths)
    normalizer = {"constant": 60.0, "sequence": 6.0, "tokens": counted[kept].sum()}[normalization]
    return Objective(
        -1 - 3 * random[1],
        torch.randn(ROLLOUTS, generator=generator, dtype=torch.float64),
        mask,
        normalizer,
        weights=1 / counted.clamp(min=1) if normalization == "sequence" else None,
        importance_weights=0.5 + random[2],
        penalties=(Penalty("reference", 0.1, "k3", -2 - random[2]),) if penalty else (),
    )


def backward(policy: Policy, loss: PolicyLoss, split: list[list[int]], terms: Objective) -> dict:
    """Gradients of a policy, whole, by name of the weight."""
    options = OptimizerConfig(schedule="constant", warmup_fraction=0)
    learner = Learner("small", policy, loss, options, learning_rate=1e-2, total_steps=1)
    learner.optimizer.zero_grad()
    batches = [TokenBatch.build(PROMPTS, COMPLETIONS, sorted_rows(rows), CPU) for rows in split]
    learner.backward(batches, terms, StepMetrics(CPU), temperature=TEMPERATURE)
    grads = {name: parameter.grad for name, parameter in policy.lm.named_parameters()}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in grads.items()}


def sorted_rows(rows: list[int]) -> list[int]:
    lengths = PROMPTS.lengths + COMPLETIONS.lengths
    return sorted(rows, key=lambda row: -lengths[row])


def distance(ours: dict, gold: dict) -> float:
    """Largest difference of a weight's gradient, as a share of its largest entry."""
    assert ours.keys() == gold.keys()
    return max(
        ((ours[name].double() - grad).abs().max() / grad.abs().max()).item()
        for name, grad in gold.items()
    )


@pytest.mark.parametrize(
    ("kind", "normalization", "penalty"),
    [(kind, name, False) for kind in SURROGATES for name in NORMALIZERS]
    + [("clip", name, True) for name in NORMALIZERS],
)
def test_micro_batches(models, process_group, kind, normalization, penalty):
    """In fp64, also without some of the rollouts."""
    lm = load_causal_lm(str(models["large"]), dtype=torch.float64)
    policy, loss = Policy(lm, vocab_size=VOCAB), PolicyLoss(kind)
    for dropped in ([], [2, 1]):
        kept = [row for row in WHOLE[0] if row not in dropped]
        terms = objective(normalization, kept, penalty=penalty)
        gold = backward(policy, loss, [kept], terms)
        assert all(grad.abs().max() > 1e-6 for grad in gold.values())
        for split in SPLITS:
            parts = [[row for row in rows if row in kept] for rows in split]
            assert distance(backward(policy, loss, parts, terms), gold) < 1e-10


@pytest.mark.parametrize("which", ["selective", "full"])
def test_checkpointed_activations(models, process_group, which):
    lm = load_causal_lm(str(models["large"]), dtype=torch.float64)
    policy, terms = Policy(lm, vocab_size=VOCAB), objective("tokens", WHOLE[0], penalty=False)
    gold = backward(policy.train(), PolicyLoss(), SPLITS[1], terms)
    checkpoint_activations(lm, which)
    assert distance(backward(policy, PolicyLoss(), SPLITS[1], terms), gold) == 0


def compare_processes(rank: int, folder: str, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    alone = Policy(load_causal_lm(path, dtype=torch.float32), vocab_size=VOCAB)
    sharded = load_policy("small.path", path, TrainingConfig(dtype="float32"), VOCAB, CPU)
    for kind in SURROGATES:
        for normalization in NORMALIZERS:
            loss, terms = PolicyLoss(kind), objective(normalization, WHOLE[0], penalty=False)
            gold = backward(alone.double(), loss, WHOLE, terms)
            floats = replace(
                terms,
                old_logps=terms.old_logps.float(),
                advantages=terms.advantages.float(),
                weights=None if terms.weights is None else terms.weights.float(),
                importance_weights=terms.importance_weights.float(),
            )
            error = distance(backward(alone.float(), loss, WHOLE, floats), gold)
            for shares in SHARES:
                ours = backward(sharded, loss, shares[rank], floats)
                assert distance(ours, gold) < 2 * error + 1e-6, (kind, normalization)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("model", ["small", "large"], ids=["tied", "untied"])
def test_processes(models, tmp_path, model):
    """Two, in fp32, against one in fp64: every kind, every normalizer."""
    spawn(compare_processes, str(tmp_path), str(models[model]), processes=2)
