"""Rollouts, and their loss in plain PyTorch: whole logits, one sequence at a time."""

import torch
from torch import Tensor, nn

from codistill.batch import Ragged, TokenBatch
from codistill.objective import Objective
from codistill_kernels import reference

CPU = torch.device("cpu")
VOCAB, ROLLOUTS, NORMALIZER, TEMPERATURE = 18, 8, 50.0, 0.9


def rollouts() -> tuple[list, list, list[Tensor], Tensor]:
    """Prompts, completions, old log-probabilities and advantages; lengths from 1 to 8."""
    generator = torch.Generator().manual_seed(0)
    prompts, completions, old = [], [], []
    for row in range(ROLLOUTS):
        prompts.append(torch.randint(2, VOCAB, (2 + row % 3,), generator=generator).tolist())
        completions.append(torch.randint(0, VOCAB, (row + 1,), generator=generator).tolist())
        old.append(-4 * torch.rand(row + 1, generator=generator))
    return prompts, completions, old, torch.randn(ROLLOUTS, generator=generator)


def objective() -> Objective:
    _, _, old, advantages = rollouts()
    old_logps = torch.cat(old)
    return Objective(old_logps, advantages, torch.ones_like(old_logps).bool(), NORMALIZER)


def batch_of(rows: list[int]) -> TokenBatch:
    """The longest rollout comes first."""
    prompts, completions, *_ = rollouts()
    return TokenBatch.build(Ragged.of(prompts), Ragged.of(completions), rows[::-1], CPU)


def plain_logps(lm: nn.Module) -> list[Tensor]:
    """Log-probabilities of each completion's tokens by the model's own forward pass."""
    logps = []
    for prompt, completion in zip(*rollouts()[:2], strict=True):
        logits = lm(input_ids=torch.tensor([prompt + completion])).logits[0]
        logits = logits[len(prompt) - 1 : -1, :VOCAB] / TEMPERATURE
        targets = torch.tensor(completion)[:, None]
        logps.append(logits.log_softmax(-1).gather(1, targets).squeeze(1))
    return logps


def plain_loss(lm: nn.Module) -> Tensor:
    """The loss of the reference, summed over the rollouts."""
    _, _, old, advantages = rollouts()
    total = torch.zeros((), dtype=torch.float64)
    for row, logps in enumerate(plain_logps(lm)):
        per_token = advantages[row].double().expand(len(logps))
        total = total + reference.policy_loss(logps, old[row], per_token, normalizer=NORMALIZER)
    return total
