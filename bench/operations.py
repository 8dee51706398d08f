"""Every operation that is measured, and its implementations."""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from packaging.version import Version
from torch import Tensor

from bench import eager, ours, peers
from bench.batch import Batch
from bench.shapes import Shape

Run = Callable[[Batch], Tensor | tuple[Tensor, ...]]
OURS = "codistill_kernels"


@dataclass(frozen=True)
class Implementation:
    """A function on a batch, and what it needs to run."""

    run: Run
    package: str
    """Name of the distribution whose version is recorded."""
    module: str = ""
    """Name of a module that must be importable."""
    capability: int = 0
    """Least compute capability (major) that it needs; 0: it runs on a CPU too."""
    exactly: bool = False
    """Whether it runs on no GPU of higher capability."""
    since: str = ""
    """First version of the package that has it."""

    def missing(self, device: torch.device) -> str:
        """Why it cannot run here; empty if it can."""
        if self.capability:
            have = torch.cuda.get_device_capability()[0] if device.type == "cuda" else 0
            if have != self.capability if self.exactly else have < self.capability:
                return f"needs a GPU of compute capability {self.capability}"
        if self.module and importlib.util.find_spec(self.module.split(".")[0]) is None:
            return f"{self.package} is not installed"
        if self.since and Version(self.version) < Version(self.since):
            return f"needs {self.package} {self.since}"
        return ""

    @property
    def version(self) -> str:
        """The package's version; empty if it runs from its source."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""


@dataclass(frozen=True, eq=False)
class Operation:
    """A function of the package; `bench.ours` and `bench.eager` have one of the same name."""

    name: str
    differentiable: bool = True
    peers: dict[str, Implementation] = field(default_factory=dict)
    gradient_only: bool = False
    """Whether only our gradient, not our value, is what peers compute."""

    def implementations(self) -> dict[str, Implementation]:
        """Ours, the eager baseline, that baseline compiled, and the peers, by name."""
        baseline = getattr(eager, self.name)
        return {
            OURS: Implementation(getattr(ours, self.name), "codistill-grpo"),
            "eager": Implementation(baseline, "torch"),
            "torch.compile": Implementation(compiled(self.name), "torch"),
            **self.peers,
        }

    @property
    def modes(self) -> tuple[str, ...]:
        return ("forward", "backward", "both") if self.differentiable else ("forward",)

    def flops(self, shape: Shape, mode: str) -> float:
        """Operations of the products that the mathematics needs, over active tokens; 0 without a
        head. Each is 2 N H V: one forward, two backward for each model that is differentiated. What
        an implementation computes twice counts once."""
        of_forward = shape.hidden + shape.large_hidden
        of_backward = 2 * (shape.hidden if shape.has_teacher else of_forward)
        hidden = {
            "forward": of_forward,
            "backward": of_backward,
            "both": of_forward + of_backward,
        }[mode]
        return 2.0 * shape.active * hidden * shape.vocab


def compiled(operation: str) -> Run:
    """The eager implementation under torch.compile; it is compiled at its first call."""

    @functools.cache
    def function() -> Run:
        return torch.compile(getattr(eager, operation))

    return lambda batch: function()(batch)


LOGPS = {
    "TRL chunked": Implementation(peers.trl_logps, "trl", "trl"),
    "Liger FLSCE": Implementation(peers.liger_scaled_cross_entropy, "liger-kernel", "liger_kernel"),
    "Liger FLCE": Implementation(peers.liger_cross_entropy, "liger-kernel", "liger_kernel", 8),
    "cut-cross-entropy": Implementation(peers.cce, "cut-cross-entropy", "cut_cross_entropy"),
    "verl": Implementation(peers.verl_logps, "verl", "verl", 9),
    "F.linear_cross_entropy": Implementation(peers.torch_logps, "torch", since="2.13"),
}
LOSSES = {
    "codistill linear_logps": Implementation(ours.linear_logps_and_policy_loss, "codistill-grpo"),
    "Liger GRPO": Implementation(peers.liger_grpo, "liger-kernel", "liger_kernel"),
    **{name: replace(peer, run=peers.loss_of(peer.run)) for name, peer in LOGPS.items()},
}
CROSS_ENTROPIES = {
    "F.linear_cross_entropy": Implementation(
        peers.torch_chunked_cross_entropy, "torch", since="2.13"
    ),
    "Liger FLCE": Implementation(
        functools.partial(peers.liger_cross_entropy, reduction="mean"),
        "liger-kernel",
        "liger_kernel",
        8,
    ),
    "cut-cross-entropy": Implementation(
        functools.partial(peers.cce, reduction="mean"), "cut-cross-entropy", "cut_cross_entropy"
    ),
    "QuACK": Implementation(peers.quack_cross_entropy, "quack-kernels", "quack", 9, exactly=True),
}
DIVERGENCES = {
    "TRL chunked": Implementation(peers.trl_divergence, "trl", "trl", since="1.16"),
    "Liger JSD": Implementation(peers.liger_divergence, "liger-kernel", "liger_kernel"),
}
OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("linear_policy_loss", peers=LOSSES),
        Operation("linear_logps", peers=LOGPS),
        Operation("linear_cross_entropy", peers=CROSS_ENTROPIES, gradient_only=True),
        Operation("codistill_losses"),
        Operation("linear_reverse_kl", differentiable=False),
        Operation("linear_divergence", peers=DIVERGENCES),
        Operation(
            "selective_logps", peers={"TRL": Implementation(peers.trl_selective, "trl", "trl")}
        ),
        Operation("policy_loss"),
        Operation("importance_weights", differentiable=False),
        Operation("kd_rewards", differentiable=False),
        Operation("group_advantages", differentiable=False),
        Operation("downsample", differentiable=False),
        Operation("codistill_scores", differentiable=False),
    )
}
