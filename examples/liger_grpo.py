"""Liger's fused GRPO loss by these kernels: the same training with Liger's class and with ours.

    python examples/liger_grpo.py        (needs liger-kernel)

In code that imports

    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

change the import to

    from codistill_kernels.integrations.liger import LigerFusedLinearGRPOLoss
"""

import torch
from torch import Tensor, nn

from codistill_kernels.integrations.liger import LigerFusedLinearGRPOLoss

PROMPTS, GENERATIONS, LENGTH, VOCAB, HIDDEN = 4, 8, 12, 199, 32


class Policy(nn.Module):
    """The smallest language model with a backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.backbone = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.lm_head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.backbone(self.embedding(tokens))[0]


@torch.no_grad()
def generate(policy: Policy, temperature: float) -> tuple[Tensor, Tensor]:
    """[B, 1 + LENGTH] tokens, of which the first is a prompt, and the others' log-probabilities."""
    tokens = torch.arange(PROMPTS).repeat_interleave(GENERATIONS)[:, None]
    logps = []
    for _ in range(LENGTH):
        log_p = (policy.lm_head(policy(tokens)[:, -1]) / temperature).log_softmax(-1)
        chosen = torch.multinomial(log_p.exp(), 1)
        logps.append(log_p.gather(1, chosen))
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens, torch.cat(logps, dim=1)


def score(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Masks through the first multiple of 7, which ends a completion, and GRPO's advantages. The
    reward is the share of even tokens."""
    completions = tokens[:, 1:]
    ends = (completions % 7 == 0).int()
    mask = (ends.cumsum(1) - ends == 0).float()
    rewards = ((completions % 2 == 0) * mask).sum(1) / mask.sum(1)
    rewards = rewards.view(PROMPTS, GENERATIONS)
    centered = rewards - rewards.mean(1, keepdim=True)
    return mask, (centered / (rewards.std(1, keepdim=True) + 1e-6)).flatten()


def train(loss_class, steps: int = 20, **settings) -> list[float]:
    """Loss of each step. There are two updates per batch of rollouts, and a KL penalty."""
    torch.manual_seed(0)
    policy, reference = Policy(), Policy()
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.SGD(policy.parameters(), lr=5.0)
    loss_fn = loss_class(**dict(beta=0.04, temperature=0.9) | settings)
    losses = []
    for step in range(steps):
        if step % 2 == 0:
            tokens, old_logps = generate(policy, loss_fn.temperature)
            mask, advantages = score(tokens)
        with torch.no_grad():
            ref_hidden = reference(tokens[:, :-1])
        loss, _ = loss_fn(
            policy(tokens[:, :-1]),
            policy.lm_head.weight,
            tokens[:, 1:],
            mask,
            advantages,
            bias=policy.lm_head.bias,
            old_per_token_logps=old_logps,
            ref_input=ref_hidden,
            ref_weight=reference.lm_head.weight,
            ref_bias=reference.lm_head.bias,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.set_num_threads(1)  # faster for tensors this small
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Liger

    rows = zip(train(Liger, compiled=False), train(LigerFusedLinearGRPOLoss), strict=True)
    for step, (liger, fused) in enumerate(rows):
        print(f"step {step:2d}  loss {liger: .6f}  by the kernels {fused: .6f}")


if __name__ == "__main__":
    main()
