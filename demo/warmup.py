"""Make the demo's two Qwen2 models, their tokenizer and its data: `python demo/warmup.py`.

The task is a sum of three two-digit numbers with one worked step:

    48+75+19=  ->  <think>48+75=123;123+19=142</think><answer>142</answer>

Both models see generated problems with worked solutions for a short while (next-token loss on the
solution). The small one stops early, so that reinforcement learning has something left to teach.
The result lies in demo/{small,large,data}; it is committed, so only a change of the task or of
the models needs this script. About 6 minutes on 2 cores.
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
MAX_TOKENS = 56  # the longest problem with its solution has 45 tokens
BATCH_SIZE = 128
# vocab_size differs on purpose: real families pad their embeddings differently (Qwen2.5: 151936
# rows in the 1.5B, 152064 in the 7B, for 151665 tokens). Head size 32 is vLLM's smallest on a CPU.
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
LARGE = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, vocab_size=48)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, one a tag."""
    words = ["<pad>", "<eos>", *"0123456789+=;", *TAGS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<[^>]+>|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def make_problems(count: int, seed: int, without: frozenset[str] = frozenset()) -> list[dict]:
    """Distinct problems, none of them in `without`."""
    rng = random.Random(seed)
    problems: dict[str, dict] = {}
    while len(problems) < count:
        a, b, c = (rng.randint(10, 99) for _ in range(3))
        if (problem := f"{a}+{b}+{c}") not in without:
            solution = f"<think>{a}+{b}={a + b};{a + b}+{c}={a + b + c}</think>"
            solution += f"<answer>{a + b + c}</answer>"
            problems[problem] = {"problem": problem, "answer": str(a + b + c), "solution": solution}
    return list(problems.values())


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, max_positions: int = 128, **sizes: int
) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"],
        intermediate_size=3 * sizes["hidden_size"],
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def batch_of(pairs: list[tuple[str, str]], tokenizer, max_tokens: int) -> tuple:
    """input_ids and labels [len(pairs), max_tokens] of prompts and their solutions; only the
    solution and <eos> are learnt."""
    rows, labels = [], []
    for text, solution_text in pairs:
        prompt = tokenizer.encode(text)
        solution = [*tokenizer.encode(solution_text), tokenizer.eos_token_id]
        padding = max_tokens - len(prompt) - len(solution)
        rows.append(prompt + solution + [tokenizer.pad_token_id] * padding)
        labels.append([-100] * len(prompt) + solution + [-100] * padding)
    return torch.tensor(rows), torch.tensor(labels)


@torch.no_grad()
def accuracy(model, tokenizer, pairs: list[tuple[str, str]], max_new_tokens: int) -> float:
    """Share of prompts that get their answer, sampled at temperature 1."""
    groups: dict[int, list] = {}
    for prompt, answer in pairs:
        ids = tokenizer.encode(prompt)
        groups.setdefault(len(ids), []).append((ids, answer))
    right = 0
    for group in groups.values():
        prompts = torch.tensor([ids for ids, _ in group])
        output = model.generate(prompts, do_sample=True, max_new_tokens=max_new_tokens)
        for (_, answer), text in zip(group, tokenizer.batch_decode(output), strict=True):
            right += f"<answer>{answer}</answer>" in text
    return right / len(pairs)


def warm_up(
    model, make_batch, *, steps: int, learning_rate: float, measure, every: int, target: float = 1.1
) -> None:
    """Next-token training on make_batch(step), until measure(), the accuracy, reaches the target;
    measured every `every` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50))
    for step in range(steps):
        ids, labels = make_batch(step)
        mask = (labels != -100).long().flip(1).cummax(1).values.flip(1)  # all but the padding
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            right = measure()
            print(f"step {step + 1}: loss {loss.item():.4f}, accuracy {right:.3f}", flush=True)
            if right >= target:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write into")
    parser.add_argument("--small-steps", type=int, default=450, help="warm-up steps, small model")
    parser.add_argument("--large-steps", type=int, default=800, help="warm-up steps, large model")
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    held_out = make_problems(256, seed=1)
    train = make_problems(4096, seed=2, without=frozenset(p["problem"] for p in held_out))
    (args.output / "data").mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", train), ("eval", held_out)):
        lines = [json.dumps({key: p[key] for key in ("problem", "answer")}) for p in problems]
        (args.output / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    plans = (("small", SMALL, args.small_steps, 3e-3), ("large", LARGE, args.large_steps, 2e-3))
    banned = frozenset(p["problem"] for p in held_out)

    def make_batch(step: int) -> tuple:
        problems = make_problems(BATCH_SIZE, 1000 + step, banned)
        pairs = [(p["problem"] + "=", p["solution"]) for p in problems]
        return batch_of(pairs, tokenizer, MAX_TOKENS)

    questions = [(p["problem"] + "=", p["answer"]) for p in held_out]
    for name, sizes, steps, learning_rate in plans:
        torch.manual_seed(0)
        model = make_model(tokenizer, **sizes)
        print(f"{name}: {model.num_parameters():,} parameters")
        warm_up(
            model,
            make_batch,
            steps=steps,
            learning_rate=learning_rate,
            measure=partial(accuracy, model, tokenizer, questions, MAX_TOKENS),
            every=50,
        )
        model.to(torch.bfloat16).save_pretrained(args.output / name)
        tokenizer.save_pretrained(args.output / name)


if __name__ == "__main__":
    main()
