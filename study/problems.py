"""Word problems of several difficulties, with worked solutions: the study's task.

    Ann has 48 pens. Then buys 75. Then loses 19. How many?
    <think>48+75=123;123-19=104</think><answer>104</answer>

A problem has one to four steps; a step adds, takes away or multiplies. The problems of a run have
at most three steps; in the models' warm-up every fifth has four. The four held-out sets stand for
the paper's four benchmarks; none of their problems is trained on, and those of `longer` have more
steps than any of a run.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from codistill.files import write_text

NAMES = ["Ann", "Ben", "Eva", "Leo", "Mia", "Tom"]
THINGS = ["apples", "books", "cards", "coins", "pens", "stamps"]
GAINS = ["buys", "finds", "gets", "wins"]
LOSSES = ["drops", "gives", "loses", "sells"]
GROWTH = {2: "doubles", 3: "triples", 4: "quadruples"}
WORDS = ["has", "Then", "How", "many", *NAMES, *THINGS, *GAINS, *LOSSES, *GROWTH.values()]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
MAX_NUMBER = 999  # the largest result of a step


@dataclass(frozen=True)
class Problem:
    text: str
    answer: str
    solution: str

    def row(self) -> dict[str, str]:
        """A line of a data file of the trainer."""
        return {"problem": self.text, "answer": self.answer}


@dataclass(frozen=True)
class Kind:
    """Problems of like difficulty."""

    steps: tuple[int, ...]
    """How many steps they have, each equally often."""
    products: bool
    """Every problem has a step that multiplies; else none has."""


TRAINING = [Kind((1, 2, 3), products=False), Kind((2, 3), products=True)]
WARM_UP = [*TRAINING, *TRAINING, Kind((4,), products=False)]
HELD_OUT = {
    "sums": Kind((2,), products=False),
    "long_sums": Kind((3,), products=False),
    "products": Kind((2, 3), products=True),
    "longer": Kind((4,), products=False),
}
HELD_OUT_SEED = 1
HELD_OUT_PROBLEMS = 200  # a set


def make_problem(rng: random.Random, kind: Kind) -> Problem:
    """A problem of this kind."""
    steps = rng.choice(kind.steps)
    product_at = rng.randrange(steps) if kind.products else None
    total = rng.randint(10, 99)
    sentences = [f"{rng.choice(NAMES)} has {total} {rng.choice(THINGS)}."]
    lines = []
    for step in range(steps):
        sentence, line, total = make_step(rng, total, step == product_at)
        sentences.append(f"Then {sentence}.")
        lines.append(f"{line}={total}")
    text = " ".join([*sentences, "How many?"])
    solution = f"<think>{';'.join(lines)}</think><answer>{total}</answer>"
    return Problem(text, str(total), solution)


def make_step(rng: random.Random, total: int, product: bool) -> tuple[str, str, int]:
    """What happens, what is to be computed, and the result, between 1 and `MAX_NUMBER`."""
    factors = [factor for factor in GROWTH if total * factor <= MAX_NUMBER]
    if product and factors:
        factor = rng.choice(factors)
        return GROWTH[factor], f"{total}*{factor}", total * factor
    number = rng.randint(10, 99)
    gains = total <= number or (total + number <= MAX_NUMBER and rng.random() < 0.5)
    if gains:
        return f"{rng.choice(GAINS)} {number}", f"{total}+{number}", total + number
    return f"{rng.choice(LOSSES)} {number}", f"{total}-{number}", total - number


def make_problems(
    count: int, seed: int, kinds: list[Kind], without: frozenset[str] = frozenset()
) -> list[Problem]:
    """Distinct problems, of each kind equally many, none of them in `without`."""
    rng, problems = random.Random(seed), dict[str, Problem]()
    while len(problems) < count:
        problem = make_problem(rng, kinds[len(problems) % len(kinds)])
        if problem.text not in without:
            problems[problem.text] = problem
    return list(problems.values())


def held_out() -> dict[str, list[Problem]]:
    """The problems of every held-out set."""
    return {
        name: make_problems(HELD_OUT_PROBLEMS, HELD_OUT_SEED + place, [kind])
        for place, (name, kind) in enumerate(HELD_OUT.items())
    }


def held_out_texts() -> frozenset[str]:
    """What no training problem may be."""
    return frozenset(problem.text for problems in held_out().values() for problem in problems)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, a tag, a digit or a sign; spaces are none.

    Words are added tokens, because transformers replaces the rest of any Qwen2 model's tokenizer by
    that of Qwen2, which would take them apart.
    """
    words = ["<pad>", "<eos>", *"0123456789+-*=;.?", *TAGS, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("<[^>]+>|[A-Za-z]+|."), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in [*TAGS, *WORDS]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def write(problems: list[Problem], file: Path) -> None:
    """Write a data file of the trainer."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(problem.row()) + "\n" for problem in problems))
