"""From scored rollouts to what the update of one model trains on."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from codistill.config import Config
from codistill.learner import MicroBatch, Penalty
from codistill.scoring import Rollouts, Scored


@dataclass(frozen=True)
class Update:
    """Micro-batches of this process and the count that the sum over all processes is divided by."""

    micro_batches: list[MicroBatch]
    normalizer: float


def make_update(
    config: Config,
    name: str,
    rollouts: Rollouts,
    scored: Scored,
    device: torch.device,
    *,
    alpha: float = 0.0,
) -> Update:
    """Of the model `name`: the rollouts kept, with its advantages. Every process must call.

    alpha: weight of the KD term where it is in the objective.
    """
    size, rows = config.training.micro_batch_size, scored.kept.tolist()
    masks = [loss_mask(config, name, rollouts, row) for row in rows]
    micro_batches = []
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        micro_batches.append(
            MicroBatch(
                tokens=rollouts.batch(rows[part], device),
                old_logps=torch.cat(
                    [old_logps(config, name, rollouts, scored, row) for row in rows[part]]
                ),
                advantages=scored.advantages[name][part],
                mask=torch.cat(masks[part]).to(device),
                weights=rollout_weights(config, masks[part], device),
                importance_weights=of_rows(scored.importance_weights, rows[part]),
                penalties=penalties(config, name, scored, part, alpha),
            )
        )
    tokens = torch.tensor(float(sum(mask.sum() for mask in masks)), device=device)
    return Update(micro_batches, normalizer(config, tokens))


def normalizer(config: Config, tokens: Tensor) -> float:
    """What the sum over tokens of all processes is divided by; tokens: in this process's loss."""
    # 1/prompts * 1/G of Eq. 2, Eq. 5 and Eq. 10, prompts counted over all processes.
    kept = config.rollout.prompts_per_step * config.kept
    if config.loss.normalization == "constant":
        return kept * config.rollout.max_completion_tokens
    if config.loss.normalization == "sequence":
        return kept
    if dist.is_initialized():
        dist.all_reduce(tokens)
    return max(1.0, tokens.item())


def rollout_weights(config: Config, masks: list[Tensor], device: torch.device) -> Tensor | None:
    """[S] 1/|o| of Eq. 2, tokens in the loss counted; None where a rollout's length is nothing."""
    if config.loss.normalization != "sequence":
        return None
    return 1 / torch.tensor([max(1.0, float(mask.sum())) for mask in masks], device=device)


def old_logps(config: Config, name: str, rollouts: Rollouts, scored: Scored, row: int) -> Tensor:
    """[tokens of the rollout]: the denominator of the importance ratio.

    The writer's, of every token (Eq. 5, Eq. 10); in Eq. 8 those of the large model, where it wrote.
    """
    hint, old = rollouts.hints[row], scored.logps[config.writer][row]
    if config.loss.old_logps == "engine":
        old = torch.cat([old[:hint], old.new_tensor(rollouts.completions[row].logps)])
    if name == "small" and config.hint.loss == "importance" and hint:
        old = torch.cat([scored.logps["large"][row][:hint], old[hint:]])
    return old


def loss_mask(config: Config, name: str, rollouts: Rollouts, row: int) -> Tensor:
    """[tokens of the rollout] bool: which are in the loss."""
    completion = rollouts.completions[row]
    mask = torch.ones(len(completion.token_ids), dtype=torch.bool)
    if name == "small" and config.hint.loss == "masked":
        mask[: rollouts.hints[row]] = False
    if completion.truncated and config.rollout.truncated == "mask":
        mask[:] = False
    return mask


def penalties(
    config: Config, name: str, scored: Scored, part: slice, alpha: float
) -> tuple[Penalty, ...]:
    """Of a part of the rollouts kept: beta's of Eq. 2, and the KD term where it is one."""
    found = []
    if config.loss.beta:
        reference = torch.cat(scored.reference_logps[name][part])
        found.append(Penalty("reference", config.loss.beta, "k3", reference))
    in_objective = config.kd.placement == "objective"
    if name == "small" and scored.teacher_logps is not None and in_objective:
        teacher = torch.cat([scored.teacher_logps[row] for row in scored.kept[part].tolist()])
        found.append(Penalty("kd", alpha, config.kd.chosen_estimator, teacher))
    return tuple(found)


def of_rows(per_rollout: list[Tensor] | None, rows: list[int]) -> Tensor | None:
    return None if per_rollout is None else torch.cat([per_rollout[row] for row in rows])
