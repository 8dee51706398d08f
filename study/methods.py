"""What is compared: each method is a few keys of the trainer beside those of its task's file."""

from dataclasses import dataclass, replace
from typing import Literal

STEPS = 64
"""Steps of a run; the budget. Continued training takes a quarter of them more."""
EPOCHS = 4  # passes over the training problems within a run; Table 3 has 8 over 7500 or more
CONTINUED_SHARE = 0.25
LOW_RATE = 0.25  # of the learning rate, in the control of continued training
Group = Literal["main", "sweep", "ablation"]
SEEDS: dict[Group, range] = {"main": range(10), "sweep": range(5), "ablation": range(5)}
"""The seeds of a group's methods. The paper has 5."""
ADDED_SEEDS = range(5, 10)
"""Seeds that the main methods got after the first five had been seen (docs/study.md)."""


@dataclass(frozen=True)
class Method:
    name: str
    title: str
    """As tables and figures call it."""
    options: dict[str, str]
    group: Group
    teacher: str | None = None
    """The method whose large model, after the evaluation with the highest accuracy, is frozen."""
    start: str | None = None
    """The method from whose large model, after its last step, this one goes on."""
    rate: float = 1.0
    """Its learning rates, as a share of the task's."""

    @property
    def needs(self) -> str | None:
        """The method whose run with the same seed comes first."""
        return self.teacher or self.start

    @property
    def steps_share(self) -> float:
        """Steps of a run, as a share of the budget."""
        return CONTINUED_SHARE if self.start else 1.0


GRPO = {
    "algorithm": "grpo",
    "rollout.num_generations": "8",
    "downsample.method": "none",
}


def codistill(name: str, title: str, group: Group, **options: str) -> Method:
    """CoDistill-GRPO with some keys changed; __ in a name stands for the dot."""
    return Method(name, title, {k.replace("__", "."): v for k, v in options.items()}, group)


HINT_TOKENS = "6"  # of about 27: the large model writes the first sum's terms (docs/study.md)

MAIN = [
    Method("grpo_small", "GRPO", GRPO | {"grpo.model": "small"}, "main"),
    Method("grpo_large", "GRPO", GRPO | {"grpo.model": "large"}, "main"),
    Method("kdrl", "KDRL", {"algorithm": "kdrl", "kd.alpha": "1"}, "main", teacher="grpo_large"),
    codistill("codistill_alpha1", "CoDistill-GRPO, α = 1", "main", kd__alpha="1"),
    codistill("codistill_alpha2", "CoDistill-GRPO, α = 2", "main", kd__alpha="2"),
    codistill(
        "codistill_hints",
        f"CoDistill-GRPO, α = 1, T = {HINT_TOKENS}",
        "main",
        kd__alpha="1",
        hint__tokens=HINT_TOKENS,
    ),
]


def continued(method: Method) -> Method:
    """A few steps of GRPO on the large model that `method` has trained (section 4.2)."""
    options = GRPO | {"grpo.model": "large"}
    title = f"{method.title}, CT"
    return Method(f"{method.name}_ct", title, options, "main", start=method.name)


CONTINUED = [continued(method) for method in MAIN if method.name not in ("grpo_small", "kdrl")]
# The paper does not say at which rate training is continued. Here Adam starts anew, with no decay
# behind it, so that the rate at which a run begins may be too high for the end of one.
LOW_CONTINUED = [
    replace(
        method,
        name=f"{method.name}_low",
        title=f"{method.title} at {LOW_RATE:g} of the rate",
        rate=LOW_RATE,
    )
    for method in CONTINUED
    if method.start in ("grpo_large", "codistill_alpha1")
]

SWEEP = [
    codistill(f"codistill_alpha{alpha}", f"CoDistill-GRPO, α = {alpha}", "sweep", kd__alpha=alpha)
    for alpha in ("0", "0.5", "4", "8")
]

ABLATIONS = [
    # Figure 7: neither KD reward nor down-sampling, and each alone (alpha 0 is in the sweep).
    codistill(
        "no_kd_no_downsampling",
        "no KD, no down-sampling",
        "ablation",
        kd__alpha="0",
        rollout__num_generations="8",
        downsample__method="none",
    ),
    codistill(
        "no_downsampling",
        "no down-sampling",
        "ablation",
        rollout__num_generations="8",
        downsample__method="none",
    ),
    # Figure 8: hints in all epochs, of two lengths; hint tokens left out of the loss.
    codistill(
        "hints_always",
        f"hints always, T = {HINT_TOKENS}",
        "ablation",
        hint__tokens=HINT_TOKENS,
        hint__epochs=str(EPOCHS),
    ),
    codistill(
        "long_hints_always",
        f"hints always, T = {2 * int(HINT_TOKENS)}",
        "ablation",
        hint__tokens=str(2 * int(HINT_TOKENS)),
        hint__epochs=str(EPOCHS),
    ),
    codistill(
        "hints_masked",
        "hints outside the loss",
        "ablation",
        hint__tokens=HINT_TOKENS,
        hint__epochs=str(EPOCHS),
        hint__loss="masked",
    ),
    # Section 3.1: hint tokens with an importance ratio over the large model that wrote them.
    codistill(
        "hints_importance",
        "hints by Eq. 8",
        "ablation",
        hint__tokens=HINT_TOKENS,
        hint__epochs=str(EPOCHS),
        hint__loss="importance",
    ),
    # Figure 9: the estimate of Eq. 4, in the reward and in the objective (section 3.1).
    codistill("kd_k3", "Eq. 4 in the reward", "ablation", kd__estimator="k3"),
    codistill("kd_objective", "Eq. 4 in the objective", "ablation", kd__placement="objective"),
]

METHODS = {
    method.name: method for method in [*MAIN, *CONTINUED, *LOW_CONTINUED, *SWEEP, *ABLATIONS]
}
