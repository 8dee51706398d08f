"""Make the study's two Qwen2 models: `python -m study.warmup`.

Both see generated problems with worked solutions for a while (next-token loss on the solution),
the small one until it solves 5 to 20 % of the held-out problems, the large one 30 to 60 %. The
result lies in study/models; it is committed, so that every run of the study starts from the same
weights. About 10 minutes on one core.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from demo.warmup import BATCH_SIZE, accuracy, batch_of, make_model, warm_up
from study.problems import WARM_UP, held_out, held_out_texts, make_problems, make_tokenizer

MODELS = Path(__file__).parent / "models"
MAX_TOKENS = 80  # the longest problem with its solution has 79 tokens
POSITIONS = 256  # tokens; prompt and completion of a run have at most 160
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
LARGE = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=96)
PLANS = {"small": (SMALL, 3e-3, 0.08), "large": (LARGE, 2e-3, 0.35)}
"""Sizes, learning rate, and the mean accuracy on the held-out sets at which the warm-up ends."""
MAX_STEPS = 4000


def make_batch(step: int, tokenizer, banned: frozenset[str]) -> tuple:
    problems = make_problems(BATCH_SIZE, 1000 + step, WARM_UP, banned)
    return batch_of([(p.text, p.solution) for p in problems], tokenizer, MAX_TOKENS)


def mean_accuracy(model, tokenizer) -> float:
    """Mean over the held-out sets, sampled at temperature 1; prints that of each."""
    found = {
        name: accuracy(model, tokenizer, [(p.text, p.answer) for p in problems], MAX_TOKENS)
        for name, problems in held_out().items()
    }
    print(", ".join(f"{name} {value:.3f}" for name, value in found.items()), end="; ")
    return sum(found.values()) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=MODELS, help="folder to write into")
    parser.add_argument("--only", choices=list(PLANS), help="make this model alone")
    args = parser.parse_args()
    tokenizer, banned = make_tokenizer(), held_out_texts()
    for name in [args.only] if args.only else PLANS:
        sizes, learning_rate, target = PLANS[name]
        torch.manual_seed(0)
        model = make_model(tokenizer, max_positions=POSITIONS, **sizes)
        print(f"{name}: {model.num_parameters():,} parameters")
        warm_up(
            model,
            partial(make_batch, tokenizer=tokenizer, banned=banned),
            steps=MAX_STEPS,
            learning_rate=learning_rate,
            measure=partial(mean_accuracy, model, tokenizer),
            every=50,
            target=target,
        )
        model.to(torch.bfloat16).save_pretrained(args.output / name)
        tokenizer.save_pretrained(args.output / name)


if __name__ == "__main__":
    main()
