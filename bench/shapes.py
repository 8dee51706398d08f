"""Sizes of real models, cut to what the device can measure in a reasonable time."""

from dataclasses import dataclass

# Hidden size and rows of the lm_head's weight, from the models' config.json.
MODELS = {
    "Qwen2.5-Math-1.5B": (1536, 151936),
    "Qwen2.5-Math-7B": (3584, 152064),
    "Llama-3.2-1B": (2048, 128256),
    "Llama-3.1-8B": (4096, 128256),
    "Qwen3-8B": (4096, 151936),
}
PAPER_MODELS = tuple(MODELS)[:4]
VOCABULARY = 151665  # tokens that Qwen2.5-Math has; the weights of its heads have more rows
PAIR = ("Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B")  # the paper's small and large model
ROLLOUTS_PER_PROMPT, KEPT = 14, 8  # M and G of Table 3
CPU_VOCAB_SHARE = 16  # a CPU gets 1/16 of the vocabulary: all cases take half an hour


@dataclass(frozen=True)
class Shape:
    """Sizes of one case; 0 where an operation has no such axis."""

    model: str
    tokens: int
    hidden: int = 0
    vocab: int = 0
    large_hidden: int = 0
    """Hidden size of the second model, for operations on two."""
    logit_gap: float | None = None
    """Standard deviation of the second model's logits from the first's; None: unrelated."""
    has_teacher: bool = False
    """Whether the second model is a frozen teacher, of which nothing is differentiated."""
    sequences: int = 8
    inactive: float = 0.0
    """Share of the tokens that the mask takes out, at the end of each sequence."""
    head_rows: int = 0
    """Rows of the lm_head's weight if it has more than the vocabulary; else 0."""

    @property
    def weight_rows(self) -> int:
        """Rows of the lm_head's weight."""
        return self.head_rows or self.vocab

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """One per model."""
        return tuple(filter(None, (self.hidden, self.large_hidden)))

    @property
    def active(self) -> int:
        """Tokens that the mask leaves."""
        per_sequence = self.tokens // self.sequences
        return self.sequences * (per_sequence - round(self.inactive * per_sequence))

    def __str__(self) -> str:
        sizes = [self.tokens, *filter(None, (self.hidden, self.vocab))]
        share = f", {self.inactive:.0%} inactive" if self.inactive else ""
        return f"{self.model} {'x'.join(map(str, sizes))}{share}"


def head_shape(model: str, tokens: int, *, is_cpu: bool, inactive: float = 0.0) -> Shape:
    """One model's head."""
    hidden, vocab = MODELS[model]
    return Shape(model, tokens, hidden, cut(vocab, is_cpu=is_cpu), inactive=inactive)


def pair_shape(
    tokens: int, *, is_cpu: bool, logit_gap: float | None = None, has_teacher: bool = False
) -> Shape:
    """The heads of both models of the paper, cut to the vocabulary that they share."""
    (hidden, vocab), (large_hidden, _) = (MODELS[name] for name in PAIR)
    vocab = cut(vocab, is_cpu=is_cpu)
    return Shape("+".join(PAIR), tokens, hidden, vocab, large_hidden, logit_gap, has_teacher)


def rollout_shape(prompts: int, tokens: int) -> Shape:
    """M rollouts per prompt, each of so many tokens, without a model or a vocabulary."""
    sequences = prompts * ROLLOUTS_PER_PROMPT
    return Shape(f"{prompts} prompts", sequences * tokens, sequences=sequences)


def cut(vocab: int, *, is_cpu: bool) -> int:
    """As much of a vocabulary as the device can measure in a reasonable time."""
    return vocab // CPU_VOCAB_SHARE if is_cpu else vocab
