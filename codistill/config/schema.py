"""Configuration of a run: typed, complete, checked before anything is loaded. Imports no torch.

A run is one YAML file and `--section.key value` on the command line, which wins. Every field says
what it does and its unit; `python train.py --help` prints them all.
"""

import math
from pathlib import Path
from typing import Any, Literal, Self, assert_never

from pydantic import Field, model_validator

from codistill.config.algorithm import (
    AdvantageConfig,
    DownsampleConfig,
    GRPOConfig,
    HintConfig,
    KDConfig,
    LossConfig,
)
from codistill.config.base import (
    CommandOptions,
    ConfigError,
    UserPath,
    require,
)
from codistill.config.data import DataConfig, RewardConfig
from codistill.config.machinery import (
    CheckpointConfig,
    DistributedConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainingConfig,
)


class Config(CommandOptions):
    """CoDistill-GRPO: train a large and a small model at the same time.

    --config FILE reads a YAML file; the options below win over it. codistill-train --dry-run checks
    everything as at a start, prints the configuration and the plan of a step, and ends.
    """

    name: str = Field(description="name of the run: a folder of this name in output_dir is made")
    output_dir: UserPath = Field(Path("runs"), description="the run is written to output_dir/name")
    algorithm: Literal["codistill", "kdrl", "grpo"] = Field(
        "codistill",
        description="codistill: both models learn (Eq. 5 to 10). kdrl: the large one is a frozen "
        "teacher (Eq. 5 and 6). grpo: one model learns from its own rollouts (Eq. 2 to 4)",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of data order and sampling")
    small: ModelConfig | None = Field(None, description="phi: writes the rollouts, learns by Eq. 5")
    large: ModelConfig | None = Field(
        None, description="theta: scores the rollouts, learns by Eq. 10"
    )
    grpo: GRPOConfig = Field(GRPOConfig(), description="what algorithm grpo trains")
    data: DataConfig = Field(description="problems and prompts")
    reward: RewardConfig = Field(RewardConfig(), description="r of Eq. 6")
    rollout: RolloutConfig = Field(RolloutConfig(), description="generation by the small model")
    hint: HintConfig = Field(HintConfig(), description="beginnings by the large model")
    kd: KDConfig = Field(KDConfig(), description="on-policy KD reward (Eq. 6)")
    downsample: DownsampleConfig = Field(DownsampleConfig(), description="M to G (section 3.3)")
    advantage: AdvantageConfig = Field(AdvantageConfig(), description="Eq. 7, Eq. 3")
    loss: LossConfig = Field(LossConfig(), description="surrogate of Eq. 2, Eq. 5 and Eq. 10")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW, for both models")
    training: TrainingConfig = Field(TrainingConfig(), description="length and memory of the run")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="held-out accuracy")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="saved to go on from")
    log: LogConfig = Field(LogConfig(), description="loggers")
    distributed: DistributedConfig = Field(DistributedConfig(), description="several processes")

    @model_validator(mode="before")
    @classmethod
    def check_models(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Raise ConfigError for a model that is missing. This check runs before the sections are
        read: without a model nothing else that is wrong matters."""
        needed: tuple = ("small", "large")
        if values.get("algorithm") == "grpo":
            section = values.get("grpo")
            chosen = section.get("model") if isinstance(section, dict) else None
            needed = (chosen,) if chosen in needed else ()
            if not needed and not any(values.get(name) for name in ("small", "large")):
                raise ConfigError("small is missing: expected small or large, the model to train")
        for name in needed:
            if not values.get(name):
                raise ConfigError(
                    f"{name} is missing: expected {cls.model_fields[name].description}"
                )
        return values

    @property
    def writer(self) -> str:
        """Name of the model that writes the rollouts."""
        match self.algorithm:
            case "codistill" | "kdrl":
                return "small"
            case "grpo":
                return self.grpo.model or ("small" if self.small else "large")
            case _:
                assert_never(self.algorithm)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the models that learn."""
        match self.algorithm:
            case "codistill":
                return ("small", "large")
            case "kdrl" | "grpo":
                return (self.writer,)
            case _:
                assert_never(self.algorithm)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the models that the algorithm uses."""
        match self.algorithm:
            case "codistill" | "kdrl":
                return ("small", "large")
            case "grpo":
                return (self.writer,)
            case _:
                assert_never(self.algorithm)

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the models of which a frozen copy is loaded, for loss.beta. One with adapters
        needs none: without them it is its own reference."""
        return tuple(n for n in self.trained if self.loss.beta and self.model(n).lora is None)

    @property
    def evaluates_large(self) -> bool:
        """Whether the large model is evaluated, by an engine of its own: it learns, and another one
        writes the rollouts."""
        learns = "large" in self.trained and self.writer != "large"
        return learns and self.evaluation.large != "never"

    def unused(self) -> list[str]:
        """Sections that were given and that the algorithm has no use for."""
        match self.algorithm:
            case "codistill" | "kdrl":
                unused = {"grpo"}
            case "grpo":
                unused = {"small", "large", "kd"} - {self.writer}
            case _:
                assert_never(self.algorithm)
        return sorted(unused & self.model_fields_set)

    def model(self, name: str) -> ModelConfig:
        """The section of the model `name`, which is one of `loaded`."""
        model = {"small": self.small, "large": self.large}[name]
        assert model is not None, name
        return model

    @model_validator(mode="after")
    def check(self) -> Self:
        check_name(self.name)
        keep, generations = self.kept, self.rollout.num_generations
        require(
            keep <= generations,
            "rollout.num_generations",
            generations,
            f"M of at least downsample.keep = {keep} rollouts",
        )
        require(
            keep > 1 or self.advantage.group == "all",
            "downsample.keep",
            keep,
            "at least 2: a rollout alone has no advantage over its group",
        )
        check_hint(self)
        check_models_learn(self)
        check_held_out(self)
        longest = self.rollout.max_prompt_tokens + self.rollout.max_completion_tokens
        require(
            self.training.tokens_per_micro_batch >= longest,
            "training.tokens_per_micro_batch",
            self.training.tokens_per_micro_batch,
            f"at least the {longest} tokens of the longest prompt and completion",
        )
        tempered = self.loss.logp_temperature == "sampling" or self.rollout.temperature == 1
        require(
            tempered or self.loss.old_logps == "trainer",
            "loss.old_logps",
            self.loss.old_logps,
            "trainer with loss.logp_temperature = 'one': the engine knows no other temperature",
        )
        return self

    @property
    def held_out(self) -> dict[str, Path]:
        """The files of held-out problems by the name of their set; that of data.eval is ""."""
        return {"": self.data.eval} if self.data.eval else self.evaluation.sets

    @property
    def has_teacher(self) -> bool:
        """Whether there is a KD term."""
        return self.algorithm != "grpo"

    @property
    def kept(self) -> int:
        """G: rollouts of a prompt that are trained on."""
        if self.downsample.method == "none":
            return self.rollout.num_generations
        return self.downsample.keep

    @property
    def logp_temperature(self) -> float:
        """Divides the logits wherever the trainer takes log-probabilities to learn from."""
        match self.loss.logp_temperature:
            case "sampling":
                return self.rollout.temperature
            case "one":
                return 1.0
            case _:
                assert_never(self.loss.logp_temperature)

    def total_steps(self, num_problems: int) -> int:
        """Steps of the whole run: training.steps, or as many as training.epochs take."""
        prompts = self.training.epochs * num_problems
        return self.training.steps or math.ceil(prompts / self.rollout.prompts_per_step)

    @property
    def optimizer_steps(self) -> int:
        """How many optimizer steps each model takes per step."""
        return self.training.inner_epochs * self.training.mini_batches

    def check_processes(self, world_size: int) -> None:
        """Raise ConfigError unless prompts divide evenly over processes and mini-batches, and
        processes over replicas and over engines."""
        replicas, rollout = self.distributed.replicas, self.rollout
        sharers = 1 if rollout.engine == "server" else rollout.tensor_parallel
        expected = f"a divisor of the {world_size} processes"
        require(world_size % replicas == 0, "distributed.replicas", replicas, expected)
        require(world_size % sharers == 0, "rollout.tensor_parallel", sharers, expected)
        prompts, parts = self.rollout.prompts_per_step, self.training.mini_batches
        expected = f"a multiple of the {world_size} processes"
        if parts > 1:
            expected += f" times training.mini_batches = {parts}"
        require(prompts % (world_size * parts) == 0, "rollout.prompts_per_step", prompts, expected)


def check_name(name: str) -> None:
    """Raise ConfigError unless a folder of this name can be made in output_dir, and only there."""
    is_folder = name.isprintable() and "/" not in name and name.strip(" .") != ""
    fits = is_folder and len(name.encode()) <= 100
    require(fits, "name", name, "the name of one folder: printable, without /, at most 100 bytes")


def held_out_key(name: str) -> str:
    """The key under which the configuration has the file of a set of held-out problems."""
    return f"evaluation.sets.{name}" if name else "data.eval"


def check_held_out(config: Config) -> None:
    """Raise ConfigError unless exactly one of data.eval and evaluation.sets is given."""
    file, sets = config.data.eval, config.evaluation.sets
    if not file and not sets:
        description = DataConfig.model_fields["eval"].description
        raise ConfigError(f"data.eval is missing: expected {description}")
    expected = "no value beside evaluation.sets: give one of the two"
    require(not (file and sets), "data.eval", str(file), expected)


def check_data_files(config: Config) -> None:
    """Raise ConfigError for a file of problems that is not there; it is seen before torch, which
    takes seconds to import."""
    files = {"data.train": config.data.train}
    files |= {held_out_key(name): [path] for name, path in config.held_out.items()}
    for key, paths in files.items():
        for path in paths:
            require(path.exists(), key, str(path), "a file that exists")


def check_hint(config: Config) -> None:
    hint, longest = config.hint, config.rollout.max_completion_tokens
    key, value = "hint.tokens", hint.tokens
    if value:
        require("large" in config.loaded, key, value, "0 with algorithm grpo, which has one model")
        require(value < longest, key, value, f"less than rollout.max_completion_tokens = {longest}")
    else:
        require(hint.loss == "own", "hint.loss", hint.loss, "own where hint.tokens = 0")


def check_models_learn(config: Config) -> None:
    """Raise ConfigError for a key about the learning of a model that does not learn."""
    for name in set(config.loaded) - set(config.trained):
        lora = config.model(name).lora
        expected = f"no value: algorithm {config.algorithm} does not train the {name} model"
        require(lora is None, f"{name}.lora.rank", lora and lora.rank, expected)
    loss, order = config.loss, config.training.update_order
    for key in ("large_dual_clip", "large_log_ratio_clamp"):
        value = getattr(loss, key)
        expected = f"no value: algorithm {config.algorithm} does not train the large model"
        require(value is None or "large" in config.trained, f"loss.{key}", value, expected)
    require(
        order == "small_first" or config.algorithm == "codistill",
        "training.update_order",
        order,
        f"small_first: algorithm {config.algorithm} trains one model",
    )
