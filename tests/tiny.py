"""What the trainer's tests share: tiny models, configurations of them, a grader that likes them."""

import copy
import zlib
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from codistill.batch import Ragged, TokenBatch, pack
from codistill.data import Problem
from codistill.engine import Completion
from codistill.grading import Grades
from codistill.rewards import RewardTerms
from codistill.rollout import Rollouts
from codistill.scoring import token_logps


def save_model(folder: Path, tokenizer, *, hidden: int, rows: int, seed: int, tied: bool) -> Path:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 32,  # vLLM's smallest head on a CPU is 32
        num_key_value_heads=hidden // 32,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # far from uniform: a wrong weight shows
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def merged(settings: dict, changes: dict) -> dict:
    """`settings` with the changes, section by section."""
    out = copy.deepcopy(settings)
    for key, value in changes.items():
        out[key] = out.get(key, {}) | value if isinstance(value, dict) else value
    return out


class FakeGrader:
    """About half of all texts are right, whatever they say: tiny models never are."""

    def grade(self, texts, answers) -> Grades:
        correct = [
            zlib.crc32((text + gold[0]).encode()) % 2 == 0
            for text, gold in zip(texts, answers, strict=True)
        ]
        return Grades(correct, 0, 0)


def packed_logps(policy, prompts: list, completions: list, temperature: float) -> torch.Tensor:
    """[N] of the completions' tokens, one completion after the other; without a gradient."""
    prompts, completions = Ragged.of(prompts), Ragged.of(completions)
    (rows,) = pack(prompts.lengths + completions.lengths, 10**9)
    batch = TokenBatch.build(prompts, completions, rows, torch.device("cpu"))
    return token_logps(policy, [batch], len(completions.values), temperature)


PROBLEM = Problem("1+1", ("2",), "1+1=", [3, 12, 3, 13])


def make_rollouts(
    lengths: list[int],
    accuracy: list[float],
    *,
    truncated: set[int] = frozenset(),
    logp: float = 0.0,
) -> Rollouts:
    """Rollouts of one problem with so many tokens; logp: of every token, in the engine."""
    count = len(lengths)
    rewards = RewardTerms(torch.tensor(accuracy), torch.zeros(count), {})
    completions = [
        Completion([2] * n, [logp] * n, row in truncated) for row, n in enumerate(lengths)
    ]
    return Rollouts.of([PROBLEM] * count, [""] * count, completions, [0] * count, rewards)
