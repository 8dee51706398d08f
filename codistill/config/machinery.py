"""The sections of the configuration about a run's machinery: models, rollouts, optimizer, memory,
evaluation, files, processes."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from codistill.config.base import Section, UserPath, UserPathOrName, check_temperature, require
from codistill.config.data import SET_NAMES, is_set_name

StopString = Annotated[str, Field(min_length=1, max_length=1000)]
OwnEngine = Literal["auto", "vllm", "hf"]
"""An engine in the process that uses it."""
EngineKind = Literal[OwnEngine, "server"]
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
        description="auto: vllm where it is installed, else hf (the forward pass of transformers). "
        "server: processes of their own, at rollout.servers",
    )
    servers: list[str] = Field(
        [],
        max_length=1000,
        description="engine server: URLs of what `python -m codistill serve` has started, as "
        "http://127.0.0.1:8001",
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
    tensor_parallel: int = Field(
        1,
        gt=0,
        le=10**4,
        description="processes, neighbours by rank, that share one copy of vLLM's weights, for a "
        "model that is too large for a GPU; it must divide the number of processes and of heads. "
        "With engine server: GPUs of each server",
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

    @model_validator(mode="after")
    def check(self) -> Self:
        servers = [server.rstrip("/") for server in self.servers]
        if self.engine != "server":
            require(not servers, "servers", self.servers, f"none with engine {self.engine}")
            return self
        require(bool(servers), "servers", self.servers, "the URLs of engine server, one or more")
        for server in servers:
            require(is_address(server), "servers", server, "a URL such as http://127.0.0.1:8001")
        require(len(set(servers)) == len(servers), "servers", self.servers, "each server once")
        expected = "false with engine server, whose memory is not the trainer's"
        require(not self.sleep, "sleep", self.sleep, expected)
        return self


def is_address(url: str) -> bool:
    """Whether a URL names a server by HTTP or HTTPS and nothing else: no path, no user."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    whole = f"{parts.scheme}://{name}" + (f":{port}" if port is not None else "")
    return parts.scheme in ("http", "https") and bool(name) and whole == url.lower()


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
    large: Literal["never", "ends", "always"] = Field(
        "ends",
        description="when the large model is evaluated, too. ends: before the first and after the "
        "last step; always: whenever the small one is. Where vLLM writes the rollouts, it is done "
        "by a server of its own, which starts in 10 to 20 s on a CPU, each time",
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        check_temperature(self.temperature)
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
