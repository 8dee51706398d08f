"""torchtitan's chunked cross-entropy by these kernels.

Signatures are those of torchtitan in August 2026; nothing of it is imported.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from codistill_kernels._checks import require
from codistill_kernels.linear_token_loss import linear_token_loss

IGNORE_INDEX = -100


class LinearCrossEntropyLoss:
    """Takes the place of torchtitan.components.loss.ChunkedLossWrapper around CrossEntropyLoss.

    The model stops before its head (`_skip_lm_head=True`), and the loss is made from hidden states
    in one pass over the logits. Unlike torchtitan's, it takes any number of tokens, and it may be
    scaled or added to another loss before backward().
    """

    def __init__(self) -> None:
        self.lm_head: nn.Module | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """lm_head: a module with a `weight` [V, H] and perhaps a `bias` [V]. It may be wrapped by
        fully_shard, or hold DTensors that tensor parallelism has sharded by rows of the vocabulary,
        evenly or not, as ColwiseParallel does."""
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of -log p of the labels divided by global_valid_tokens (None: 1), and no metrics.

        Args:
            pred: [T, H] hidden states, differentiable; a DTensor must be Replicate, the same tokens
                on all processes that share the head.
            labels: [T] int64; -100 is ignored.
            global_valid_tokens: a scalar, the number of valid labels on all processes.

        Returns:
            (loss, {}): an fp32 scalar.

        Raises:
            ValueError: there is no head yet, or an argument has a wrong shape, dtype or value.
        """
        head = self.lm_head
        require(head is not None, "lm_head", "set by set_lm_head before the first call", None)
        assert head is not None

        def loss_of(hidden_states: Tensor) -> Tensor:
            return linear_token_loss(
                hidden_states.to_local() if isinstance(pred, DTensor) else hidden_states,
                head.weight,
                labels,
                lambda logps, entropy, rows: -logps,
                labels != IGNORE_INDEX,
                normalizer=1.0 if global_valid_tokens is None else global_valid_tokens,
                bias=getattr(head, "bias", None),
            )[0]

        return call_as(head, loss_of, pred), {}


def call_as(module: nn.Module, forward: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Call the module with another forward function. Its hooks still run: FSDP's gather the
    parameters for the call and reduce their gradients after the backward pass."""
    module.forward = forward
    try:
        return module(*arguments)
    finally:
        del module.forward  # uncovers the forward function of the class
