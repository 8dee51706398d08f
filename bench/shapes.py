"""What is measured: sizes of real models, cut to what the device can do in a reasonable time."""

from dataclasses import dataclass, replace

# Hidden size and rows of the lm_head, from the models' config.json.
MODELS = {
    "Qwen2.5-Math-1.5B": (1536, 151936),
    "Qwen2.5-Math-7B": (3584, 152064),
    "Llama-3.2-1B": (2048, 128256),
    "Llama-3.1-8B": (4096, 128256),
    "Qwen3-8B": (4096, 151936),
}
PAPER_MODELS = tuple(MODELS)[:4]
VOCABULARY = 151665  # tokens of Qwen2.5-Math, whose heads have more rows
PAIR = ("Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B")  # of the paper: its small and its large model
ROLLOUTS_A_PROMPT, KEPT = 14, 8  # M and G of Table 3
CPU_VOCAB_SHARE = 16  # on a CPU a sixteenth of the vocabulary: all cases in half an hour


@dataclass(frozen=True)
class Shape:
    """Sizes of one case; 0 where an operation has no such axis."""

    model: str
    tokens: int
    hidden: int = 0
    vocab: int = 0
    large_hidden: int = 0
    """Of the second model, for operations on two."""
    logit_gap: float | None = None
    """Standard deviation of the second model's logits from the first's; None: unrelated."""
    sequences: int = 8
    inactive: float = 0.0
    """Share of the tokens that the mask takes out, at the end of each sequence."""
    head_rows: int = 0
    """Of the lm_head's weight, where they are more than the vocabulary; else 0."""

    def with_tokens(self, tokens: int) -> "Shape":
        return replace(self, tokens=tokens)

    @property
    def weight_rows(self) -> int:
        return self.head_rows or self.vocab

    @property
    def active(self) -> int:
        per_sequence = self.tokens // self.sequences
        return self.sequences * (per_sequence - round(self.inactive * per_sequence))

    def __str__(self) -> str:
        sizes = [self.tokens, *filter(None, (self.hidden, self.vocab))]
        share = f", {self.inactive:.0%} inactive" if self.inactive else ""
        return f"{self.model} {'x'.join(map(str, sizes))}{share}"


def head_shape(model: str, tokens: int, *, is_cpu: bool, inactive: float = 0.0) -> Shape:
    hidden, vocab = MODELS[model]
    return Shape(model, tokens, hidden, cut(vocab, is_cpu=is_cpu), inactive=inactive)


def pair_shape(tokens: int, *, is_cpu: bool, logit_gap: float | None) -> Shape:
    """Both models of the paper, on the vocabulary that they share."""
    (hidden, vocab), (large_hidden, _) = (MODELS[name] for name in PAIR)
    vocab = cut(vocab, is_cpu=is_cpu)
    return Shape("+".join(PAIR), tokens, hidden, vocab, large_hidden, logit_gap)


def rollout_shape(prompts: int, tokens: int) -> Shape:
    """M rollouts of each prompt, of so many tokens each: no model, no vocabulary."""
    sequences = prompts * ROLLOUTS_A_PROMPT
    return Shape(f"{prompts} prompts", sequences * tokens, sequences=sequences)


def cut(vocab: int, *, is_cpu: bool) -> int:
    return vocab // CPU_VOCAB_SHARE if is_cpu else vocab
