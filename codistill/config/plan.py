"""The machines that `python -m codistill plan` plans for."""

from typing import Literal

from pydantic import Field

from codistill.config.base import Section
from codistill.config.schema import Config


class MachineConfig(Section):
    gpus: int = Field(8, gt=0, le=10**5, description="processes, each with a GPU")
    gpu: Literal["A100", "H100", "H200", "B200"] = Field("H100", description="which GPU")
    memory_gib: float | None = Field(
        None, gt=0, description="memory of a GPU (GiB); by default the largest it is sold with"
    )
    gpus_per_node: int = Field(8, gt=0, description="GPUs that NVLink connects")
    network: float = Field(
        50.0, gt=0, description="from a GPU to other nodes (GB/s); 50 is a 400 Gbit/s card per GPU"
    )
    mean_prompt_tokens: float = Field(150.0, gt=0, description="for the times (tokens)")
    mean_completion_tokens: float | None = Field(
        None, gt=0, description="for the times (tokens); by default a quarter of the longest"
    )


class PlanOptions(Config):
    """Memory and time of a step of this configuration on GPUs, by formulas. Nothing is loaded.

    --config FILE reads a YAML file; the options below win over it.
    """

    machine: MachineConfig = Field(MachineConfig(), description="what the run is planned for")

    @property
    def gpus_per_replica(self) -> int:
        """GPUs that share the weights of a model between them."""
        return self.machine.gpus // self.distributed.replicas

    @property
    def mean_completion(self) -> float:
        """Tokens of a completion, on average."""
        longest = self.rollout.max_completion_tokens
        return min(self.machine.mean_completion_tokens or longest / 4, longest)

    @property
    def mean_sequence(self) -> float:
        """Tokens of a prompt and its completion, on average."""
        return self.machine.mean_prompt_tokens + self.mean_completion

    @property
    def forward_bytes(self) -> int:
        """Bytes per number of the forward pass."""
        return 4 if self.training.dtype == "float32" else 2
