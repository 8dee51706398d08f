"""verl's fused head by these kernels: the same training with verl's definition and with ours.

    python examples/verl_linear_cross_entropy.py

In verl itself, before a worker builds its model:

    from verl.utils.kernel import linear_cross_entropy as module
    from codistill_kernels.integrations.verl import linear_cross_entropy
    module.linear_cross_entropy = linear_cross_entropy

with actor_rollout_ref.model.use_fused_kernels=True and .fused_kernel_options.impl_backend=triton.
"""

import torch
from torch import Tensor, nn

from codistill_kernels.integrations.verl import linear_cross_entropy

PROMPTS, GENERATIONS, LENGTH, VOCAB, HIDDEN = 4, 8, 12, 199, 32


def definition(hidden, weight, labels, temperature=1.0) -> tuple[Tensor, Tensor]:
    """What verl's kernel computes, in plain PyTorch: log-probabilities and entropies, flat."""
    logits = hidden.flatten(0, -2) @ weight.T / temperature
    log_p = logits.float().log_softmax(-1)
    logprobs = log_p.gather(-1, labels.reshape(-1, 1).long()).squeeze(-1)
    return logprobs, -(log_p.exp() * log_p).sum(-1)


class Policy(nn.Module):
    """The smallest language model with a backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.backbone = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.backbone(self.embedding(tokens))[0]


@torch.no_grad()
def generate(policy: Policy, temperature: float) -> Tensor:
    """[B, 1 + LENGTH] tokens: a prompt of one token, and its completion by the policy."""
    tokens = torch.arange(PROMPTS).repeat_interleave(GENERATIONS)[:, None]
    for _ in range(LENGTH):
        logits = policy.lm_head(policy(tokens)[:, -1]) / temperature
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return tokens


def advantages_of(tokens: Tensor) -> Tensor:
    """GRPO's advantages. The reward is the share of even tokens."""
    rewards = (tokens[:, 1:] % 2 == 0).float().mean(1).view(PROMPTS, GENERATIONS)
    centered = rewards - rewards.mean(1, keepdim=True)
    return (centered / (rewards.std(1, keepdim=True) + 1e-6)).view(-1, 1)


def train(fused, steps: int = 20, temperature: float = 0.9) -> list[float]:
    """Loss of each step: PPO with an entropy bonus, and two updates per batch of rollouts."""
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=5.0)
    losses = []
    for step in range(steps):
        if step % 2 == 0:
            tokens = generate(policy, temperature)
            advantages, old = advantages_of(tokens), None
        hidden, labels = policy(tokens[:, :-1]), tokens[:, 1:]
        logprobs, entropy = fused(hidden, policy.lm_head.weight, labels, temperature)
        logprobs = logprobs.view(labels.shape)
        old = logprobs.detach() if old is None else old
        ratio = (logprobs - old).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        loss = -gain.mean() - 0.01 * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.set_num_threads(1)  # faster for tensors this small
    for step, (plain, fused) in enumerate(
        zip(train(definition), train(linear_cross_entropy), strict=True)
    ):
        print(f"step {step:2d}  loss {plain: .6f}  by the kernels {fused: .6f}")


if __name__ == "__main__":
    main()
