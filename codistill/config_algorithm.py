"""Sections of the configuration that say what is computed: equations, not machinery."""

from typing import Literal

from pydantic import Field

from codistill.config_base import Section


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
        1, gt=0, description="passes over the training problems with hints (section 4: the first)"
    )
    loss: Literal["own", "importance", "masked"] = Field(
        "own",
        description="hint tokens in the small model's loss. own: as if it had written them (Eq. 5, "
        "the paper's choice); importance: ratio over the large model that wrote them (Eq. 8); "
        "masked: left out, as in BREAD",
    )


class KDConfig(Section):
    alpha: float = Field(1.0, ge=0, description="weight of the KD reward (Eq. 6)")


class DownsampleConfig(Section):
    keep: int = Field(8, gt=0, description="G: rollouts a prompt kept, G/2 best and G/2 worst")


class LossConfig(Section):
    epsilon_low: float = Field(0.2, ge=0, lt=1, description="ratio is clipped at 1 - epsilon_low")
    epsilon_high: float = Field(0.2, ge=0, description="ratio is clipped at 1 + epsilon_high")
