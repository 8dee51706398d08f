"""Configuration of a run: typed, complete, checked before anything is loaded. Imports no torch.

A run is one YAML file and `--section.key value` on the command line, which wins. Every field says
what it does and its unit; `python train.py --help` prints them all.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, assert_never

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
    Section,
    UserPath,
    UserPathOrName,
    require,
)
from codistill.config.data import SET_NAMES, DataConfig, RewardConfig, is_set_name

StopString = Annotated[str, Field(min_length=1, max_length=1000)]
EngineKind = Literal["auto", "vllm", "hf"]
LoggerKind = Literal["tensorboard", "wandb", "trackio"]
Checkpointing = Literal["none", "selective", "full"]


class LoraConfig(Section):
    rank: int = Field(gt=0, le=10**4, description="rows of A, columns of B")
    alpha: int = Field(gt=0, le=10**6, description="alpha / rank multiplies B A")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="adapted layers: a list of names such as [q_proj, v_proj], or all-linear: "
        "every linear layer but the lm_head",
    )


class ModelConfig(Section):
    path: UserPathOrName = Field(
        description="folder or Hub name of a Hugging Face causal language model"
    )
    learning_rate: float = Field(
        5e-6, gt=0, le=1e3, description="peak learning rate (Table 3: 5e-6)"
    )
    lora: LoraConfig | None = Field(
        None, description="train adapters of low rank instead of the weights"
    )


class RolloutConfig(Section):
    engine: EngineKind = Field(
        "auto",
        description="auto: vllm where it is installed, else hf (the forward pass of transformers)",
    )
    prompts_per_step: int = Field(
        64, gt=0, le=10**5, description="prompts per step, over all processes"
    )
    num_generations: int = Field(
        14, gt=1, le=10**4, description="M: rollouts per prompt (Table 3: 14)"
    )
    max_prompt_tokens: int = Field(
        1024, gt=0, le=10**7, description="longest prompt allowed (tokens)"
    )
    max_completion_tokens: int = Field(
        3072,
        gt=0,
        le=10**7,
        description="N: longest completion (tokens); divides in Eq. 5, 6 and 10",
    )
    temperature: float = Field(
        1.0,
        ge=0.01,
        le=2,
        description="divides the logits, in the engine and in the trainer alike; in vLLM at "
        "most 2, and never less than 0.01",
    )
    stop: list[StopString] = Field(
        [],
        max_length=100,
        description="texts that end a completion, at the first token with which its text has one "
        "of them; it keeps that token. Special tokens count as text",
    )
    skip_special_tokens: bool = Field(
        True,
        description="special tokens are no part of the text that is graded and that reward "
        "functions get; the end token never is",
    )
    truncated: Literal["keep", "mask", "zero_reward"] = Field(
        "keep",
        description="rollouts that max_completion_tokens cut off. keep: they count as any other; "
        "mask: they are left out of the loss; zero_reward: r = 0. The paper does not say",
    )
    sampling_rounds: int = Field(
        1,
        gt=0,
        le=10**4,
        description="dynamic sampling (DAPO): write rollouts for prompts_per_step other prompts, "
        "at most this many times, until prompts_per_step have right and wrong rollouts; 1: off",
    )
    kv_cache_gib: float = Field(
        4.0, ge=0.001, le=10**4, description="vLLM's KV cache on each process (GiB)"
    )
    sleep: bool = Field(
        False,
        description="on a GPU: the engine leaves its memory while rollouts are scored and models "
        "trained, with weights on the host and no KV cache (vLLM's sleep level 1)",
    )
    logp_gap_limit: float | None = Field(
        None,
        gt=0,
        description="stop when engine and trainer disagree on a token's log-probability by more "
        "(nats); by default 1e-3 in float32, in bfloat16 0.1 on average and 1 on 99 % of tokens",
    )


class OptimizerConfig(Section):
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after the warm-up; cosine ends at zero"
    )
    warmup_fraction: float = Field(
        0.05, ge=0, le=1, description="share of all steps in which the learning rate rises linearly"
    )
    weight_decay: float = Field(0.0, ge=0, le=1e3, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")


class TrainingConfig(Section):
    epochs: int = Field(1, gt=0, le=10**6, description="passes over the training problems")
    steps: int | None = Field(
        None, gt=0, le=10**9, description="stop after this many steps instead"
    )
    tokens_per_micro_batch: int = Field(
        16384,
        gt=0,
        le=10**9,
        description="tokens, prompts included, per forward and backward pass: rollouts lie one "
        "after the other, nothing is padded",
    )
    attention: Literal["auto", "flash", "sdpa"] = Field(
        "auto",
        description="within each packed rollout: flash (flash-attn's kernels for variable lengths, "
        "bfloat16 on a GPU), sdpa (torch's own, rollouts of like lengths together), auto: flash "
        "where it runs",
    )
    inner_epochs: int = Field(
        1,
        gt=0,
        le=10**4,
        description="optimizer steps of each model on the rollouts of a step, each on all of them; "
        "the paper does not say; with 1 the small model's ratio is 1",
    )
    mini_batches: int = Field(
        1,
        gt=0,
        le=10**4,
        description="optimizer steps of each model in an inner epoch, each on the rollouts kept of "
        "as many prompts; more than 1: the ratio of Eq. 5 moves away from 1 within a step",
    )
    update_order: Literal["small_first", "large_first"] = Field(
        "small_first",
        description="algorithm codistill. small_first: both learn from the log-probabilities "
        "before the step (Figure 2). large_first: the small model's KD term takes the large model "
        "after its update, at the cost of scoring once more",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="type of the forward and backward pass; weights stay float32"
    )
    head_dtype: Literal["same", "float32"] = Field(
        "same", description="type of embedding, last norm and lm_head: as dtype, or float32"
    )
    gradient_checkpointing: Checkpointing = Field(
        "none",
        description="activations that the backward pass computes again: less memory, more time. "
        "selective: all but products and attention; full: all but what each layer begins with",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="what stays in the host's memory. optimizer: the optimizer's states between "
        "its steps; all: weights, gradients and states. The CPU then takes the optimizer's steps, "
        "and a layer's weights are on the GPU while it runs",
    )
    max_skipped: int = Field(
        3,
        gt=0,
        le=10**6,
        description="an optimizer step whose gradient is not finite is skipped; stop after this "
        "many in a row",
    )


class EvaluationConfig(Section):
    sets: dict[str, UserPath] = Field(
        {},
        description="sets of held-out problems in the place of data.eval: name and file of each, "
        "as MATH500=math500.jsonl; an accuracy is then the mean over the sets",
    )
    every: int = Field(
        50, gt=0, le=10**9, description="steps between evaluations of the small model"
    )
    temperature: float = Field(
        0.0, ge=0, le=2, description="sampling temperature; 0 is greedy, else at least 0.01"
    )
    large: bool = Field(
        True, description="also evaluate the large model, before the first and after the last step"
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        sampled = self.temperature == 0 or self.temperature >= 0.01
        require(sampled, "temperature", self.temperature, "0, or at least 0.01")
        for name in self.sets:
            require(is_set_name(name), "sets", name, SET_NAMES)
        return self


class CheckpointConfig(Section):
    every: int = Field(50, gt=0, le=10**9, description="steps between checkpoints")
    keep: int = Field(
        2, ge=2, description="how many checkpoints are kept, the last: one may be damaged"
    )
    asynchronous: bool = Field(
        False,
        description="write checkpoints while training goes on, from copies in the host's memory",
    )


class LogConfig(Section):
    to: list[LoggerKind] = Field(
        [],
        description="where the numbers of each step and evaluation go, beside the files of the run",
    )
    project: str = Field(
        "codistill", min_length=1, max_length=100, description="project in wandb and trackio"
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        require(len(set(self.to)) == len(self.to), "to", self.to, "each logger once")
        return self


class DistributedConfig(Section):
    replicas: int = Field(
        1,
        gt=0,
        description="how often the processes together hold the weights of each model; 1: once, "
        "each process a share; the number of nodes: each node all, and only gradients cross the "
        "network between nodes",
    )
    timeout: float = Field(
        600.0,
        ge=1,
        le=1e6,
        description="the run ends when a process has waited this long for another one (seconds)",
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
        processes over replicas."""
        replicas = self.distributed.replicas
        expected = f"a divisor of the {world_size} processes"
        require(world_size % replicas == 0, "distributed.replicas", replicas, expected)
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
