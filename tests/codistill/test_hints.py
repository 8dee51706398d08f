"""Hints: sampled by the current large model, completed by the small one, and their place in the
loss of the small model."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import spawn
from tiny import packed_logps

from codistill.config import Config
from codistill.config.machinery import TrainingConfig
from codistill.data import Problem, counted
from codistill.engine import Completion
from codistill.hints import hint_length, hint_uniforms, write_hints
from codistill.model.loading import load_policy
from codistill.objective import make_objectives
from codistill.rewards import RewardTerms
from codistill.rollout import Rollouts
from codistill.scoring import Credit, Scored

CPU = torch.device("cpu")
VOCAB, END, TEMPERATURE = 18, 1, 0.8
PROMPTS = [[3, 12, 4, 13], [9, 13], [5, 12, 5, 13, 2, 2], [7]]
UNIFORMS = hint_uniforms(0, 1, counted(range(len(PROMPTS))), 1, 5)


def sample_plainly(policy) -> list[list[int]]:
    """Token after token, one prompt at a time, no cache, no padding, from log-probabilities."""
    out = []
    for prompt, uniforms in zip(PROMPTS, UNIFORMS, strict=True):
        tokens: list[int] = []
        for uniform in uniforms:
            each = [[*tokens, token] for token in range(VOCAB)]
            logps = packed_logps(policy, [prompt] * VOCAB, each, TEMPERATURE)
            logps = logps.view(VOCAB, -1)[:, -1]
            tokens.append(int(np.searchsorted(logps.double().exp().cumsum(0), uniform, "right")))
        out.append(tokens)
    return out


def check_sampling(rank: int, folder: str, paths: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for path, checkpointing in zip(paths, ("none", "full"), strict=True):
        options = TrainingConfig(dtype="float32", gradient_checkpointing=checkpointing)
        policy = load_policy("small.path", path, options, VOCAB, CPU)
        tokens, logps = policy.sample(PROMPTS, UNIFORMS, TEMPERATURE)
        expected = packed_logps(policy, PROMPTS, tokens, TEMPERATURE)
        torch.testing.assert_close(torch.tensor(logps).flatten(), expected, rtol=0, atol=1e-5)
        assert tokens == sample_plainly(policy)
        assert policy.training and len({tuple(row) for row in tokens}) == len(PROMPTS)
    dist.barrier()
    dist.destroy_process_group()


def test_sampling_with_a_cache_is_sampling_without(models, tmp_path):
    """On two processes, with a tied head and with an untied one."""
    spawn(check_sampling, str(tmp_path), [str(models[m]) for m in ("small", "large")], processes=2)


def test_sampling_rounds_no_logits(make_trainer):
    """bf16 logits of 10 to 20 are 1/16 apart: sampled tokens would not be those of the trainer."""
    policy = make_trainer({"training": {"dtype": "bfloat16"}}).policies["large"]
    policy.lm.lm_head.weight.data.mul_(8)  # peaked, so that a rounded logit shows
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    policy.sample([[3]], np.zeros((1, 1)), 1.0)  # gathers the weights, in bf16
    weight = policy.lm.lm_head.weight
    assert weight.dtype == torch.bfloat16
    expected = hidden.double() @ weight[: policy.vocab_size].double().T
    torch.testing.assert_close(policy.logits(hidden).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_hint_ends_with_an_end_token(make_trainer):
    policy = make_trainer().policies["large"]
    uniforms = hint_uniforms(0, 1, counted(range(40)), 1, 6)
    hints = write_hints(policy, [[3, 13]] * 40, uniforms, temperature=1.0, end_token_ids=(END,))
    tokens, _ = policy.sample([[3, 13]] * 40, uniforms, 1.0)
    cut = [row[: row.index(END) + 1] if END in row else row for row in tokens]
    assert hints == cut and min(map(len, hints)) < 6


def test_the_current_large_model_writes_the_beginning(make_trainer):
    """8 problems, 4 a step: the first epoch is steps 1 and 2."""
    trainer = make_trainer({"hint": {"tokens": 3}})
    for step in (1, 2, 3):
        rows = hint_uniforms(0, step, counted(range(8)), 6, 3)
        expected = {  # before the step: of the model as it was trained until then
            problem.prompt: trainer.policies["large"].sample(
                [problem.prompt_ids] * 6, rows[6 * i : 6 * i + 6], 1.0
            )[0]
            for i, problem in enumerate(trainer.inputs.problems)
        }
        numbers, rollouts, _ = trainer.step(step)
        assert len(rollouts) == 24
        completions, ends = rollouts.completions, rollouts.completions.cu_seqlens
        for row, hint in enumerate(rollouts.hint_lengths.tolist()):
            place = slice(ends[row], ends[row + 1])
            tokens, theirs = completions.values[place].tolist(), rollouts.engine_logps[place]
            if step == 3:
                assert hint == 0
                continue
            written = expected[rollouts.problems[row].prompt][row % 6]
            assert tokens[:hint] == written[:hint]
            assert theirs.isnan().tolist() == [True] * hint + [False] * (len(tokens) - hint)
            assert hint == 3 or (tokens[-1] == END and len(tokens) == hint)
            assert rollouts.truncated[row] == (END not in tokens) and len(tokens) <= 8
        assert (numbers["time/hint"] > 0) == (numbers["rollout/hint_tokens"] > 0) == (step < 3)
        assert numbers["time/hint"] <= numbers["time/rollout"]
        assert numbers["rollout/logp_gap_max"] < 1e-4


def test_a_problem_that_is_drawn_again_gets_other_hints():
    rows = hint_uniforms(0, 1, [(5, 0), (5, 1)], 2, 3)
    assert len({tuple(row) for row in rows.tolist()}) == 4
    assert (hint_uniforms(0, 1, [(5, 1)], 2, 3) == rows[2:]).all()


def test_hints_are_given_in_the_first_epochs_only(settings):
    config = Config(**settings | {"hint": {"tokens": 3, "epochs": 2}})
    # 4 prompts a step, 10 problems: epochs 1 and 2 are 20 prompts, 5 steps
    assert [hint_length(config, step, 10) for step in range(1, 8)] == [3] * 5 + [0] * 2
    # 9 problems: 18 prompts; the second half of step 5 belongs to the third epoch
    assert [hint_length(config, step, 9) for step in (5, 6)] == [3, 0]


@pytest.fixture
def by_hand(settings):
    """update(loss, model): two rollouts of three tokens, hints of 2 and of 0; N = 8."""
    settings["rollout"] |= {"num_generations": 2, "prompts_per_step": 1}
    settings |= {"downsample": {"keep": 2}}
    problem = Problem("1+1", ("2",), "1+1=", [3, 12, 3, 13])
    completions = [Completion([2, 3, 1], [0.0], False), Completion([4, 5, 1], [0.0] * 3, False)]
    rewards = RewardTerms(torch.zeros(2), torch.zeros(2), {})
    rollouts = Rollouts.of([problem] * 2, ["", ""], completions, [2, 0], rewards)
    small = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    large = small / 10
    advantages = {"small": torch.tensor([1.0, -1.0]), "large": torch.tensor([0.5, -0.5])}
    credit = Credit(None, torch.zeros(2), torch.arange(2), advantages)
    scored = Scored(credit, [], {"small": small, "large": large}, teacher_logps=large)

    def update(loss: str, model: str):
        changes = {"hint": {"tokens": 2, "loss": loss}}
        config = Config(**settings | changes | {"loss": {"normalization": "sequence"}})
        (objective,) = make_objectives(config, model, rollouts, scored)
        # 1/|o| of Eq. 2: the tokens that are in the loss
        masked = loss == "masked" and model == "small"
        assert objective.weights.tolist() == pytest.approx([1.0 if masked else 1 / 3, 1 / 3])
        (objective,) = make_objectives(Config(**settings | changes), model, rollouts, scored)
        assert objective.normalizer == 2 * 8
        assert objective.advantages.tolist() == advantages[model].tolist()
        return [round(x, 6) for x in objective.old_logps.tolist()], objective.mask.tolist()

    return update


def test_hint_tokens_in_the_loss_of_the_small_model(by_hand, make_trainer):
    own, all_tokens = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], [True] * 6
    assert by_hand("own", "small") == (own, all_tokens)
    # Eq. 8: the denominator of the first two tokens is the large model's
    assert by_hand("importance", "small") == ([-0.1, -0.2, *own[2:]], all_tokens)
    # BREAD: the first two tokens are not there
    assert by_hand("masked", "small") == (own, [False, False, True, True, True, True])
    # Eq. 10 has the small model's policy in the denominator, always
    for loss in ("own", "importance", "masked"):
        assert by_hand(loss, "large") == (own, all_tokens)


def test_a_change_of_the_hints_loss_changes_the_small_models_loss_only(make_trainer):
    numbers = {
        loss: make_trainer({"hint": {"tokens": 3, "loss": loss}}).step(1)[0]
        for loss in ("own", "importance", "masked")
    }
    own = numbers.pop("own")
    assert own["ratio/small_mean"] == pytest.approx(1, abs=1e-5)
    assert numbers["masked"]["ratio/small_mean"] == pytest.approx(1, abs=1e-5)
    assert abs(numbers["importance"]["ratio/small_mean"] - 1) > 1e-2
    for other in numbers.values():
        different = {k for k in own if not math.isclose(own[k], other[k], rel_tol=1e-6)}
        different = {k for k in different if not k.startswith(("time/", "tokens_per_second"))}
        assert {"loss/small", "grad_norm/small"} <= different
        assert all("small" in key for key in different)
