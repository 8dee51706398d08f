"""From scored rollouts to what the update of one model trains on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from codistill.config import Config
from codistill.learner import MicroBatch
from codistill.scoring import Rollouts, Scored


@dataclass(frozen=True)
class Update:
    """Micro-batches of this process and the count that the sum over all processes is divided by."""

    micro_batches: list[MicroBatch]
    normalizer: float


def make_update(
    config: Config, name: str, rollouts: Rollouts, scored: Scored, device: torch.device
) -> Update:
    """Of the model `name`: the rollouts kept, with its advantages."""
    size = config.training.micro_batch_size
    parts = zip(scored.kept.split(size), scored.advantages[name].split(size), strict=True)
    micro_batches = [
        MicroBatch(
            tokens=rollouts.batch(rows.tolist(), device),
            old_logps=torch.cat([old_logps(config, name, rollouts, scored, r) for r in rows]),
            advantages=advantages,
            mask=torch.cat([loss_mask(config, name, rollouts, r) for r in rows]).to(device),
        )
        for rows, advantages in parts
    ]
    # 1/prompts * 1/G * 1/N of Eq. 5 and Eq. 10, prompts counted over all processes.
    kept = config.rollout.prompts_per_step * config.downsample.keep
    return Update(micro_batches, kept * config.rollout.max_completion_tokens)


def old_logps(config: Config, name: str, rollouts: Rollouts, scored: Scored, row: int) -> Tensor:
    """[tokens of the rollout]: the denominator of the importance ratio.

    The writer's, of every token (Eq. 5, Eq. 10); in Eq. 8 those of the large model, where it wrote.
    """
    hint, old = rollouts.hints[row], scored.old_logps[row]
    if name == "small" and config.hint.loss == "importance" and hint:
        return torch.cat([scored.logps["large"][row][:hint], old[hint:]])
    return old


def loss_mask(config: Config, name: str, rollouts: Rollouts, row: int) -> Tensor:
    """[tokens of the rollout] bool: which are in the loss."""
    mask = torch.ones(len(rollouts.completions[row].token_ids), dtype=torch.bool)
    if name == "small" and config.hint.loss == "masked":
        mask[: rollouts.hints[row]] = False
    return mask
