"""What appendix F of the paper proves, of the functions that training calls.

A softmax policy given by a table: vocabulary 3 with an end token, at most N = 3 tokens, so 15
completions, which can be enumerated. All in fp64.

Eq. 5 divides by N and the proof of Lemma F.1 drops that: eta G/(G - 1) E[grad L] is eta/N grad J.
Here the factor N is kept on the left, where the learning rate takes it up.
"""

import pytest
import torch
import torch.nn.functional as F
from processes import spawn
from tiny import save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from codistill.batch import Ragged, TokenBatch, pack
from codistill.model.policy import Policy
from codistill_kernels import codistill_losses, codistill_scores, policy_loss

VOCAB, END, N = 3, 0, 3
PROMPTS = 2


def enumerate_completions() -> list[tuple[int, ...]]:
    done, begun = [], [()]
    for _ in range(N):
        longer = [tokens + (token,) for tokens in begun for token in range(VOCAB)]
        done += [tokens for tokens in longer if tokens[-1] == END or len(tokens) == N]
        begun = [tokens for tokens in longer if tokens[-1] != END]
    return done


COMPLETIONS = enumerate_completions()
STATES = sorted({tokens[:t] for tokens in COMPLETIONS for t in range(len(tokens))})
"""What may stand before a token: the rows of a table."""
LENGTHS = torch.tensor([len(tokens) for tokens in COMPLETIONS])
TOKENS = torch.tensor([tokens + (END,) * (N - len(tokens)) for tokens in COMPLETIONS])
BEFORE = torch.tensor(
    [[STATES.index(c[:t]) if t < len(c) else 0 for t in range(N)] for c in COMPLETIONS]
)
INSIDE = torch.arange(N) < LENGTHS[:, None]  # [completions, N]


def tables(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the small and the large model for each prompt, and rewards of each completion."""
    generator = torch.Generator().manual_seed(seed)
    shape = (PROMPTS, len(STATES), VOCAB)
    phi, theta = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return phi, theta, torch.rand(PROMPTS, len(COMPLETIONS), generator=generator).double()


def log_probabilities(table: Tensor) -> Tensor:
    """[states, V] -> [completions]: log pi(o | q)."""
    return torch.where(INSIDE, table.log_softmax(-1)[BEFORE, TOKENS], 0.0).sum(1)


def effective_rewards(phi: Tensor, theta: Tensor, rewards: Tensor, alpha: float) -> Tensor:
    """Eq. 6 of each completion."""
    return rewards + alpha / N * (log_probabilities(theta) - log_probabilities(phi))


def objective(phi: Tensor, theta: Tensor, rewards: Tensor, alpha: float) -> Tensor:
    """J of Lemma F.1 for one prompt; its gradient knows that the reward depends on phi."""
    probabilities = log_probabilities(phi).exp()
    return (probabilities * effective_rewards(phi, theta, rewards, alpha)).sum()


def gradient(function, phi: Tensor, *arguments) -> Tensor:
    phi = phi.clone().requires_grad_()
    return torch.autograd.grad(function(phi, *arguments), phi)[0]


def group_gradients(
    phi: Tensor, theta: Tensor, rewards: Tensor, groups: Tensor, alpha: float
) -> Tensor:
    """[K, G] groups of completions of one prompt -> [K, states, V]: the gradient of Eq. 5 of each.

    By the functions under test; each group has a copy of the table, so one call serves all.
    """
    count, size = groups.shape
    copies = phi.expand(count, *phi.shape).clone().requires_grad_()
    rows = groups.flatten()
    inside = INSIDE[rows]
    owner = torch.arange(count).repeat_interleave(size)[:, None].expand(-1, N)[inside]
    before, tokens = BEFORE[rows][inside], TOKENS[rows][inside]
    small = copies.log_softmax(-1)[owner, before, tokens]
    cu_seqlens = F.pad(LENGTHS[rows].cumsum(0), (1, 0))
    scores = codistill_scores(
        rewards[rows],
        small.detach(),
        theta.log_softmax(-1)[before, tokens],
        cu_seqlens,
        group_size=size,
        keep=size,
        alpha=alpha,
        max_completion_tokens=N,
    )
    loss, _ = policy_loss(
        small,
        small.detach(),
        scores.small_advantages,
        normalizer=size * N,
        cu_seqlens=cu_seqlens,
    )
    loss.backward()
    return -copies.grad


def expected_gradient(phi: Tensor, theta: Tensor, rewards: Tensor, alpha: float) -> Tensor:
    """E[grad L_Small | q] over all groups of G = 2."""
    groups = torch.cartesian_prod(*[torch.arange(len(COMPLETIONS))] * 2)
    probabilities = log_probabilities(phi).exp()[groups].prod(1)
    gradients = group_gradients(phi, theta, rewards, groups, alpha)
    return (probabilities[:, None, None] * gradients).sum(0)


def test_the_completions_are_all_there_are():
    phi, _, _ = tables(0)
    assert len(COMPLETIONS) == 15 and len(STATES) == 7
    assert log_probabilities(phi[0]).exp().sum().item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_lemma_f1_the_gradient_is_unbiased(alpha):
    """Over both prompts and all groups of G = 2: N G/(G - 1) E[grad L] = grad J."""
    phi, theta, rewards = tables(1)
    for q in range(PROMPTS):  # each prompt has its own table: the mean over prompts is per table
        ours = N * 2 * expected_gradient(phi[q], theta[q], rewards[q], alpha)
        true = gradient(objective, phi[q], theta[q], rewards[q], alpha)
        assert true.abs().max() > 0.01
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-14)


def test_lemma_f1_by_sampling():
    """G = 4: the mean of 40,000 groups, within 5 standard errors in each of 21 entries.

    Were the lemma true, chance alone would break this for one seed in 80,000; without G/(G - 1),
    a quarter off, it must break.
    """
    (phi, *_), (theta, *_), (rewards, *_) = tables(2)
    count, size = 40_000, 4
    generator = torch.Generator().manual_seed(0)
    probabilities = log_probabilities(phi).exp().expand(count, -1)
    groups = torch.multinomial(probabilities, size, replacement=True, generator=generator)
    gradients = N * size / (size - 1) * group_gradients(phi, theta, rewards, groups, 1.0)
    true = gradient(objective, phi, theta, rewards, 1.0)
    error = gradients.std(0) / count**0.5
    assert ((gradients.mean(0) - true).abs() <= 5 * error).all()
    assert ((gradients.mean(0) * (size - 1) / size - true).abs() > 5 * error).any()


def test_the_gradient_of_the_kd_reward_is_zero_in_expectation():
    """Eq. 12 to 14: why the KD reward carries no gradient here."""
    phi, theta, rewards = tables(3)
    probabilities = log_probabilities(phi[0]).exp()

    def expected_kd(table: Tensor) -> Tensor:
        return (probabilities * effective_rewards(table, theta[0], rewards[0], 1.0)).sum()

    assert gradient(expected_kd, phi[0]).abs().max() < 1e-15


def reverse_kl(phi: Tensor, theta: Tensor) -> Tensor:
    """KL(pi_phi || pi_theta), state by state: its chain rule, not Eq. 6's log-ratios."""
    small, large = phi.log_softmax(-1), theta.log_softmax(-1)
    total = torch.zeros((), dtype=phi.dtype)
    for number, state in enumerate(STATES):
        before = [small[STATES.index(state[:t]), state[t]] for t in range(len(state))]
        reached = torch.stack(before).sum().exp() if before else 1.0
        total = total + reached * (small[number].exp() * (small[number] - large[number])).sum()
    return total


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_theorem_f2_towards_the_reward_and_towards_the_large_model(alpha):
    """For each prompt: N G/(G - 1) E[grad L | q] = grad E[r] - alpha/N grad KL(small || large)."""
    phi, theta, rewards = tables(4)
    for q in range(PROMPTS):
        to_reward = gradient(objective, phi[q], theta[q], rewards[q], 0.0)
        from_large = alpha / N * gradient(reverse_kl, phi[q], theta[q])
        assert min(to_reward.abs().max(), from_large.abs().max()) > 0.01
        ours = N * 2 * expected_gradient(phi[q], theta[q], rewards[q], alpha)
        torch.testing.assert_close(ours, to_reward - from_large, rtol=0, atol=1e-14)


def test_the_large_model_pulls_only_where_it_differs():
    phi, _, rewards = tables(5)
    alone = expected_gradient(phi[0], phi[0], rewards[0], 0.0)
    torch.testing.assert_close(expected_gradient(phi[0], phi[0], rewards[0], 7.0), alone)


def test_the_adjusted_gradient_is_that_of_rloo():
    """The remark after Lemma F.1, group by group: the baseline is the mean of the other rewards."""
    (phi, *_), (theta, *_), (rewards, *_) = tables(6)
    groups = torch.randint(len(COMPLETIONS), (10, 4), generator=torch.Generator().manual_seed(0))
    ours = N * 4 / 3 * group_gradients(phi, theta, rewards, groups, 1.5)
    values = effective_rewards(phi, theta, rewards, 1.5)
    for group, got in zip(groups, ours, strict=True):
        reward = values[group]
        others = torch.stack([reward[torch.arange(4) != i].mean() for i in range(4)])

        def rloo(table: Tensor, group=group, weight=(reward - others)) -> Tensor:
            return (weight * log_probabilities(table)[group]).mean()

        torch.testing.assert_close(got, gradient(rloo, phi), rtol=0, atol=1e-14)


def compare_with_trl(rank: int, folder: str, path: str) -> None:
    """A batch that TRL generates and scores; then the weights move, and both losses are taken."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    group, limit, temperature = 4, 8, 0.9
    prompts = ["4+1=", "5+12=", "6+7="]
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    trainer = GRPOTrainer(
        model=lm,
        reward_funcs=lambda completions, **_: [len(text) % 3 + 0.5 for text in completions],
        args=GRPOConfig(
            output_dir=f"{folder}/trl",
            loss_type="dr_grpo",
            scale_rewards="none",
            beta=0.0,
            epsilon=0.2,
            temperature=temperature,
            num_generations=group,
            num_iterations=2,  # else TRL keeps no old log-probabilities
            per_device_train_batch_size=len(prompts) * group,
            max_completion_length=limit,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            seed=3,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    trainer.current_gradient_accumulation_steps = 1
    lm.train()
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(group)]
    inputs = trainer._generate_and_score_completions(rows)
    rewards = torch.tensor(list(trainer._logs["rewards"].values())[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)

    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    gold = {name: parameter.grad.clone() for name, parameter in lm.named_parameters()}
    lm.zero_grad()
    assert 0.01 < trainer._metrics["train"]["clip_ratio/region_mean"][-1] < 0.9

    def unpadded(name: str) -> list[list[int]]:
        pairs = zip(inputs[f"{name}_ids"], inputs[f"{name}_mask"].bool(), strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]

    prompts, completions = (Ragged.of(unpadded(name)) for name in ("prompt", "completion"))
    (order,) = pack(prompts.lengths + completions.lengths, 10**6)
    batch = TokenBatch.build(prompts, completions, order, torch.device("cpu"))
    old = inputs["old_per_token_logps"][inputs["completion_mask"].bool()]
    scores = codistill_scores(
        rewards,
        old,
        old,
        completions.cu_seqlens,
        group_size=group,
        keep=group,
        alpha=0.0,
        max_completion_tokens=limit,
    )
    torch.testing.assert_close(scores.small_advantages, inputs["advantages"], rtol=0, atol=1e-6)
    normalizer, index = len(rows) * limit, batch.index
    policy = Policy(lm, vocab_size=lm.config.vocab_size)
    ours, _ = policy.policy_loss(
        batch,
        temperature,
        old_logps=old[index],
        advantages=scores.small_advantages[batch.rows],
        normalizer=normalizer,
    )
    ours.backward()
    assert abs(ours.item() - theirs.item()) < 1e-6 and abs(theirs.item()) > 1e-3
    for name, parameter in lm.named_parameters():
        assert gold[name].abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, gold[name], rtol=0, atol=1e-6)

    model = (policy.hidden_states(batch), lm.lm_head.weight)
    for loss, _ in codistill_losses(
        model,
        model,
        batch.token_ids,
        old[index],
        scores.small_advantages[batch.rows],
        scores.large_advantages[batch.rows],
        normalizer=normalizer,
        cu_seqlens=batch.cu_seqlens,
        temperature=temperature,
    ):
        assert abs(loss.item() - theirs.item()) < 1e-6


def test_without_kd_and_with_one_model_it_is_trls_dr_grpo(tmp_path, tokenizer, monkeypatch):
    """alpha = 0, M = G, T = 0, both models the same: loss and gradient of TRL's own trainer."""
    for package in ("trl", "accelerate", "datasets"):
        pytest.importorskip(package, reason="TRL with its dependencies is in the extra 'bench'")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # another test may have set them; TRL would join
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    path = save_model(
        tmp_path / "model", tokenizer, hidden=32, rows=len(tokenizer), seed=1, tied=True
    )
    spawn(compare_with_trl, str(tmp_path), str(path), processes=1)
