"""Sections of the configuration that say what is computed: equations, not machinery."""

from typing import Literal, Self, assert_never, get_args

from pydantic import Field, model_validator

from codistill.config.base import Section, require


class GRPOConfig(Section):
    model: Literal["small", "large"] | None = Field(
        None,
        description="the model that grpo trains; by default the one configured, small if both are",
    )


class HintConfig(Section):
    tokens: int = Field(
        0,
        ge=0,
        description="T: the large model writes the first T tokens of each rollout, the small one "
        "the rest (section 3.1; the paper tries 0 and 50)",
    )
    epochs: int = Field(
        1,
        gt=0,
        le=10**6,
        description="passes over the training problems with hints (section 4: the first)",
    )
    loss: Literal["own", "importance", "masked"] = Field(
        "own",
        description="hint tokens in the small model's loss. own: as if it had written them (Eq. 5, "
        "the paper's choice); importance: ratio over the large model that wrote them (Eq. 8); "
        "masked: left out, as in BREAD",
    )


# The tables with these names are in codistill_kernels, which imports torch, so the names stand here
# once more; a test compares them. The ranges of a loss's settings stand there alone.
RewardEstimator = Literal["k1", "k3", "exact"]
ObjectiveEstimator = Literal["k2", "k3", "abs"]
KDEstimator = Literal[RewardEstimator, ObjectiveEstimator]
DownsampleMethod = Literal["top_bottom", "top", "max_variance", "random"]
LossKind = Literal[
    "clip", "cispo", "gspo", "luspo", "gmpo", "sapo", "vespo", "reinforce", "dppo_tv", "dppo_kl"
]


class KDConfig(Section):
    alpha: float = Field(1.0, ge=0, le=1e6, description="weight of the KD term (Eq. 6)")
    alpha_end: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="alpha moves in a straight line to this over the run's steps; "
        "by default it is constant, as in the paper",
    )
    placement: Literal["reward", "objective"] = Field(
        "reward",
        description="reward: added to r, detached (Eq. 6; Lemma F.1 shows that it may be). "
        "objective: subtracted from the small model's objective token by token, as beta's term is "
        "in Eq. 2 (section 3.1, Discussion)",
    )
    estimator: KDEstimator | None = Field(
        None,
        description="estimate of KL(small || large). reward: k1 (Eq. 6, default), k3 (Eq. 4, "
        "Figure 9) or exact, the divergence over the whole vocabulary at each sampled prefix. "
        "objective: k3 (Eq. 4, default), k2, whose gradient is that of the divergence, or abs, "
        "whose gradient is that of sum |p - q|; the gradient of k1 would not depend on the large "
        "model",
    )

    @property
    def chosen_estimator(self) -> KDEstimator:
        """`estimator`, or the default of the placement."""
        if self.estimator is not None:
            return self.estimator
        match self.placement:
            case "reward":
                return "k1"
            case "objective":
                return "k3"
            case _:
                assert_never(self.placement)

    @model_validator(mode="after")
    def check(self) -> Self:
        names = {"reward": RewardEstimator, "objective": ObjectiveEstimator}[self.placement]
        allowed = get_args(names)
        require(
            self.chosen_estimator in allowed,
            "estimator",
            self.estimator,
            f"{' or '.join(allowed)} with kd.placement = {self.placement!r}",
        )
        return self


class DownsampleConfig(Section):
    keep: int = Field(
        8, gt=0, description="G: rollouts kept per prompt (Table 3: 8); ignored with method none"
    )
    method: Literal[DownsampleMethod, "none"] = Field(
        "top_bottom",
        description="top_bottom: G/2 best and G/2 worst (section 3.3); top: G best; random; "
        "max_variance: the G of largest variance (PODS); none: all M, so that G = M",
    )
    by: Literal["effective_reward", "shortness", "reward_per_token"] = Field(
        "effective_reward",
        description="what best means: r~ of Eq. 6 (section 3.3), or GFPO's filters: fewest tokens, "
        "most reward per token (Shrivastava et al. 2025)",
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        even = self.keep % 2 == 0 or self.method != "top_bottom"
        require(even, "keep", self.keep, "an even number (G/2 best, G/2 worst)")
        ranked = self.method not in ("none", "random") or self.by == "effective_reward"
        expected = f"effective_reward with method {self.method}, which ranks nothing"
        require(ranked, "by", self.by, expected)
        return self


class AdvantageConfig(Section):
    baseline: Literal["mean", "leave_one_out"] = Field(
        "mean",
        description="subtracted from a rollout's reward: mean of its group (Eq. 7), or of the "
        "others in it (RLOO), which is mean times n / (n - 1) for a group of n (Lemma F.1)",
    )
    group: Literal["kept", "all"] = Field(
        "kept",
        description="the group: the G rollouts kept (Eq. 7) or all M; the paper leaves it open",
    )
    scale: Literal["none", "std", "beta"] = Field(
        "none",
        description="none: Eq. 7, Dr. GRPO; std: divided by the group's deviation (Eq. 3); beta: "
        "BNPO, the accuracy's part divided by a Beta density fitted to all prompts' accuracies",
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        alone = self.baseline == "mean" or self.scale == "none"
        require(alone, "scale", self.scale, "none with baseline leave_one_out")
        return self


class LossConfig(Section):
    """The settings of every kind of loss. Which a kind uses, and in which range, is the rule of
    `codistill_kernels.PolicyLoss`, which `codistill.losses` applies before a model is loaded."""

    kind: LossKind = Field(
        "clip",
        description="surrogate: clip (Eq. 2, 5, 10), cispo (MiniMax-M1), gspo and luspo (ratio of "
        "the whole rollout), gmpo (geometric mean of a rollout's ratios), sapo (soft gate), vespo "
        "(weight of the whole rollout), reinforce (no ratio), dppo_tv and dppo_kl (cut by how far "
        "the token's probability moved)",
    )
    epsilon_low: float = Field(
        0.2,
        description="the ratio is clipped at 1 - epsilon_low; gmpo: the log-ratio at -epsilon_low; "
        "dppo: largest distance downwards; the paper names no value, 0.2 is PPO's",
    )
    epsilon_high: float = Field(
        0.2,
        description="the ratio is clipped at 1 + epsilon_high; gmpo: the log-ratio at "
        "epsilon_high; dppo: largest distance upwards; DAPO's clip-higher is 0.28",
    )
    truncate: float | None = Field(None, description="dppo: largest ratio; no bound by default")
    sapo_temperature_positive: float = Field(
        1.0, description="sapo: steepness of the gate where A > 0"
    )
    sapo_temperature_negative: float = Field(
        1.05, description="sapo: steepness of the gate where A <= 0"
    )
    vespo_k_positive: float = Field(
        2.0, description="vespo: k of the weight W^k exp(lambda (1 - W)) where A >= 0"
    )
    vespo_lambda_positive: float = Field(3.0, description="vespo: lambda of the weight, A >= 0")
    vespo_k_negative: float = Field(3.0, description="vespo: k of the weight, A < 0")
    vespo_lambda_negative: float = Field(2.0, description="vespo: lambda of the weight, A < 0")
    normalization: Literal["constant", "sequence", "tokens"] = Field(
        "constant",
        description="weight of a token. constant: 1/N, N = rollout.max_completion_tokens (Eq. 5, "
        "Dr. GRPO); sequence: 1/|o| of its rollout (Eq. 2); tokens: the same for all tokens of "
        "the batch (DAPO)",
    )
    beta: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight of the KL estimate of Eq. 4 to the frozen model of the start, one for "
        "each model that learns (Eq. 2; the paper sets 0)",
    )
    old_logps: Literal["trainer", "engine"] = Field(
        "trainer",
        description="denominator of the ratio: the trainer's log-probabilities of the rollouts, or "
        "those that the engine sampled with; hint tokens always take the trainer's",
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="weigh each token by min(trainer/engine probability, this): truncated "
        "importance sampling; by default the weight is 1",
    )
    logp_temperature: Literal["sampling", "one"] = Field(
        "sampling",
        description="temperature of all log-probabilities in ratios and KD: rollout.temperature, "
        "or 1",
    )
    large_dual_clip: float | None = Field(
        None,
        description="large model: where A < 0 the surrogate is at least this times A; off by "
        "default, as in Eq. 10",
    )
    large_log_ratio_clamp: float | None = Field(
        None,
        description="large model: log-ratios beyond +-this (nats) count as this, without gradient "
        "(cispo: only the weight is bounded); off by default, as in Eq. 10",
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        corrected = self.importance_cap is None or self.old_logps == "trainer"
        expected = "no value with loss.old_logps = 'engine', where no mismatch is left"
        require(corrected, "importance_cap", self.importance_cap, expected)
        return self
