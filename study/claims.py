"""What the paper claims, a number for each claim, and the verdict at this scale."""

from dataclasses import dataclass

from codistill.output.evaluation_table import markdown
from study.results import (
    Measure,
    Results,
    accuracy_fall,
    early,
    final,
    gain,
    late,
    learning,
    metric_fall,
    total,
    whole,
)
from study.results import median as median_step
from study.statistics import FEWEST_PAIRS, Paired, holm, verdict

CLOSE = 0.02
"""Two points of accuracy: in the paper's Table 2 continued training ends 0.6, 1.7 and 2.9 below."""

ZERO, TRAINING = "reward/zero_fraction", "reward/accuracy"


@dataclass(frozen=True)
class Claim:
    """The measure of `high` lies above that of `low`, within seeds."""

    text: str
    source: str
    """Where the paper says it."""
    measure: Measure
    high: str
    """A method."""
    low: str | None = None
    """A method; None: 0."""
    allowance: float = 0.0
    """Added to the difference: a claim of at most so much below."""
    unit: str = "points"
    """Unit of the difference: points of accuracy, s or min."""

    def paired(self, results: Results) -> Paired:
        """The differences, positive in the claim's favour."""
        high = results.values(self.high, self.measure)
        low = results.values(self.low, self.measure) if self.low else dict.fromkeys(high, 0.0)
        return Paired.of({seed: value + self.allowance for seed, value in high.items()}, low)

    def shown(self, value: float) -> str:
        """A difference in its unit."""
        scale, digits = {"points": (100, 1), "s": (1, 3), "min": (1 / 60, 2)}[self.unit]
        return f"{scale * value:+.{digits}f}"


SMALL = [
    Claim(
        "GRPO leaves the small model with more prompts without a right rollout than the large one",
        "Figure 1",
        whole(ZERO),
        high="grpo_small",
        low="grpo_large",
    ),
    Claim("GRPO improves the small model", "Table 1", gain("small"), high="grpo_small"),
    Claim(
        "CoDistill-GRPO, α = 1: above GRPO",
        "Table 1",
        final("small"),
        high="codistill_alpha1",
        low="grpo_small",
    ),
    Claim(
        "CoDistill-GRPO, α = 2: above GRPO",
        "Table 1",
        final("small"),
        high="codistill_alpha2",
        low="grpo_small",
    ),
    Claim(
        "CoDistill-GRPO with hints: above GRPO",
        "Table 1",
        final("small"),
        high="codistill_hints",
        low="grpo_small",
    ),
    Claim("KDRL: above GRPO", "Table 1", final("small"), high="kdrl", low="grpo_small"),
    Claim(
        "CoDistill-GRPO, α = 1: above KDRL",
        "Table 1",
        final("small"),
        high="codistill_alpha1",
        low="kdrl",
    ),
    Claim(
        "α = 2: above α = 1",
        "Table 1",
        final("small"),
        high="codistill_alpha2",
        low="codistill_alpha1",
    ),
    Claim(
        "Hints: above none, on average",
        "Table 1",
        final("small"),
        high="codistill_hints",
        low="codistill_alpha1",
    ),
    Claim(
        "CoDistill-GRPO learns faster than GRPO: mean height of the curve",
        "Figure 3",
        learning("small"),
        high="codistill_alpha1",
        low="grpo_small",
    ),
    Claim(
        "CoDistill-GRPO has fewer prompts without a right rollout than GRPO, first half "
        "(of 14 rollouts against 8)",
        "Figure 4",
        early(ZERO),
        high="grpo_small",
        low="codistill_alpha1",
    ),
    Claim(
        "The same against KDRL (14 rollouts both)",
        "Figure 4",
        early(ZERO),
        high="kdrl",
        low="codistill_alpha1",
    ),
    Claim(
        "The reason without the number of rollouts: training accuracy above GRPO, first half",
        "Figure 4",
        early(TRAINING),
        high="codistill_alpha1",
        low="grpo_small",
    ),
]

LARGE = [
    Claim(
        "CoDistill-GRPO improves the large model, on the small one's rollouts",
        "Table 2",
        gain("large"),
        high="codistill_alpha1",
    ),
    Claim(
        "It stays below GRPO on its own rollouts",
        "Table 2",
        final("large"),
        high="grpo_large",
        low="codistill_alpha1",
    ),
    Claim(
        "Continued training raises it",
        "Table 2",
        final("large"),
        high="codistill_alpha1_ct",
        low="codistill_alpha1",
    ),
    Claim(
        "With continued training, α = 1: at most 2 points below GRPO",
        "Table 2",
        final("large"),
        high="codistill_alpha1_ct",
        low="grpo_large",
        allowance=CLOSE,
    ),
    Claim(
        "With continued training, α = 2: at most 2 points below GRPO",
        "Table 2",
        final("large"),
        high="codistill_alpha2_ct",
        low="grpo_large",
        allowance=CLOSE,
    ),
    Claim(
        "With continued training and hints: at most 2 points below GRPO",
        "Table 2",
        final("large"),
        high="codistill_hints_ct",
        low="grpo_large",
        allowance=CLOSE,
    ),
    Claim(
        "α = 1: at most 2 points below GRPO that is continued for as many steps",
        "not in the paper",
        final("large"),
        high="codistill_alpha1_ct",
        low="grpo_large_ct",
        allowance=CLOSE,
    ),
]

LOW_RATE = [
    Claim(
        "GRPO, CT: at most 2 points below GRPO",
        "not in the paper",
        final("large"),
        high="grpo_large_ct_low",
        low="grpo_large",
        allowance=CLOSE,
    ),
    Claim(
        "GRPO, CT: above that at the full rate",
        "not in the paper",
        final("large"),
        high="grpo_large_ct_low",
        low="grpo_large_ct",
    ),
    Claim(
        "CoDistill-GRPO, α = 1, CT: above that at the full rate",
        "not in the paper",
        final("large"),
        high="codistill_alpha1_ct_low",
        low="codistill_alpha1_ct",
    ),
    Claim(
        "CoDistill-GRPO, α = 1, CT: at most 2 points below GRPO",
        "Table 2",
        final("large"),
        high="codistill_alpha1_ct_low",
        low="grpo_large",
        allowance=CLOSE,
    ),
]

COST = [
    Claim(
        "A step of CoDistill-GRPO without down-sampling takes less time than one of GRPO "
        "of the large model",
        "Figure 5",
        median_step("time/step"),
        high="grpo_large",
        low="no_downsampling",
        unit="s",
    ),
    Claim(
        "Rollouts of a run with continued training take less time than those of GRPO",
        "Figure 6",
        total("time/rollout"),
        high="grpo_large",
        low="codistill_alpha1_ct",
        unit="min",
    ),
    Claim(
        "The same with hints",
        "Figure 6",
        total("time/rollout"),
        high="grpo_large",
        low="codistill_hints_ct",
        unit="min",
    ),
    Claim(
        "KDRL with its teacher's run takes more time than CoDistill-GRPO",
        "section 4",
        total("time/step"),
        high="kdrl",
        low="codistill_alpha1",
        unit="min",
    ),
]

STABILITY = [
    Claim(
        "Without KD and down-sampling the large model ends lower",
        "Figure 7",
        final("large"),
        high="codistill_alpha1",
        low="no_kd_no_downsampling",
    ),
    Claim(
        "and its held-out accuracy falls further from what it had reached",
        "Figure 7",
        accuracy_fall("large"),
        high="no_kd_no_downsampling",
        low="codistill_alpha1",
    ),
    Claim(
        "With hints in all epochs training accuracy falls further than with none",
        "Figure 8",
        metric_fall(TRAINING),
        high="hints_always",
        low="codistill_alpha1",
    ),
    Claim(
        "The same with hints of twice the length",
        "Figure 8",
        metric_fall(TRAINING),
        high="long_hints_always",
        low="codistill_alpha1",
    ),
    Claim(
        "and the large model ends lower, hints of twice the length",
        "Appendix C",
        final("large"),
        high="codistill_alpha1",
        low="long_hints_always",
    ),
    Claim(
        "With hints outside the loss training accuracy falls further than with hints inside",
        "Figure 8",
        metric_fall(TRAINING),
        high="hints_masked",
        low="hints_always",
    ),
    Claim(
        "Hints as the small model's own: it ends above Eq. 8",
        "section 3.1",
        final("small"),
        high="hints_always",
        low="hints_importance",
    ),
    Claim(
        "With Eq. 4 in the reward training accuracy falls further than with Eq. 6",
        "Figure 9",
        metric_fall(TRAINING),
        high="kd_k3",
        low="codistill_alpha1",
    ),
    Claim(
        "and is lower in the last quarter",
        "Figure 9",
        late(TRAINING),
        high="codistill_alpha1",
        low="kd_k3",
    ),
    Claim(
        "KD in the reward: the small model ends above KD in the objective",
        "section 3.1",
        final("small"),
        high="codistill_alpha1",
        low="kd_objective",
    ),
]

GROUPS = {
    "The small model": SMALL,
    "The large model": LARGE,
    "Continued training at a quarter of the rate": LOW_RATE,
    "Time": COST,
    "Stability": STABILITY,
}
"""Claims that Holm's procedure corrects together."""
ACCURACY = {name: GROUPS[name] for name in ("The small model", "The large model")}
"""The claims of Tables 1 and 2, whose methods have the added seeds."""

HEADER = [
    "Claim",
    "Paper",
    "Verdict",
    "In favour by (95 %)",
    "Pairs in favour",
    "p, Holm",
    "exact p",
]


def table(results: Results, groups: dict[str, list[Claim]]) -> str:
    """Markdown: a row for each claim, in its group."""
    parts = []
    for name, claims in groups.items():
        cells = [HEADER, *rows(claims, results)]
        parts += [f"**{name}**", markdown(cells)]
    return "\n\n".join(part.strip() for part in parts)


def rows(claims: list[Claim], results: Results) -> list[list[str]]:
    """The cells of each claim of a group."""
    pairs = [claim.paired(results) for claim in claims]
    judged = [paired for paired in pairs if paired.is_enough]
    adjusted = dict(zip(map(id, judged), holm([paired.p for paired in judged]), strict=True))
    return [
        [claim.text, claim.source, *figures(claim, paired, adjusted.get(id(paired)))]
        for claim, paired in zip(claims, pairs, strict=True)
    ]


def figures(claim: Claim, paired: Paired, adjusted_p: float | None) -> list[str]:
    """The verdict and its numbers; none of these with too few pairs."""
    if adjusted_p is None:
        return [f"too few pairs (n < {FEWEST_PAIRS})", "–", f"n = {paired.n}", "–", "–"]
    # An allowance decides the verdict; the reader sees the difference itself.
    ends = [paired.mean, *paired.interval]
    mean, low, high = (claim.shown(value - claim.allowance) for value in ends)
    return [
        f"**{verdict(paired, adjusted_p)}**",
        f"{mean} {claim.unit} ({low} to {high})",
        f"{paired.in_favour} of {paired.n}",
        p_text(adjusted_p),
        p_text(paired.exact_p),
    ]


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
