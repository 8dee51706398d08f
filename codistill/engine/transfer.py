"""How weights travel from the trainer to servers: by vLLM's own weight transfer.

On GPUs that is vLLM's engine for NCCL as it is. NCCL needs a GPU on each side, and never twice the
same one; where that is not so, gloo carries the weights: the same engine with another group. Both
sides import this module, which tells vLLM of it.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.nccl_common import (
    NCCLWeightTransferInitInfo,
    worker_init_payload,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from codistill.distributed import address_towards
from codistill.engine.in_process import repack_tied_head
from codistill.engine.serve import GLOO
from codistill.model.shards import Weights

PATIENCE = timedelta(minutes=30)
"""Time that a server waits for the next weight of a sync; torch's own default for gloo."""


class GlooGroup:
    """The sender, rank 0, and all workers of all servers: vLLM's group for weights, by gloo.

    Where NCCL needs a GPU on each side, and never twice the same one, gloo takes any memory.
    """

    def __init__(
        self, address: str, port: int, *, rank: int, size: int, timeout: timedelta = PATIENCE
    ) -> None:
        """They meet at a port that the sender opens at `address`; each is open to the others at the
        address by which it reaches them, and nowhere else."""
        seconds = int(timeout.total_seconds())
        met = StatelessProcessGroup.create(address, port, rank, size, store_timeout=seconds)
        options = dist.ProcessGroupGloo._Options()
        here = address if rank == 0 else address_towards(address)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=here)]
        options._timeout = timeout
        self.group = dist.ProcessGroupGloo(met.store, rank, size, options)

    def broadcast(self, tensor: Tensor) -> None:
        """The sender's numbers for all, of any dtype; in place, contiguous."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()

    def destroy(self) -> None:
        del self.group


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """The worker's side: vLLM's engine for NCCL with another group, one weight at a time."""

    model_update_group: Any

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        config = self.parallel_config
        rank = config.data_parallel_index * config.world_size + config.rank
        assert init_info.master_address is not None and init_info.master_port is not None
        self.model_update_group = GlooGroup(
            init_info.master_address,
            init_info.master_port,
            rank=rank + init_info.rank_offset,
            size=init_info.world_size,
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        names, shapes = update_info.names, update_info.shapes
        for name, dtype, shape in zip(names, update_info.dtype_names, shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model_update_group.broadcast(weight)
            self.model.load_weights([(name, weight)])

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        if self.device.type == "cpu":
            repack_tied_head(self.model)


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """NCCL's, and the time that the sender waits for a server."""

    backend: ClassVar[str] = GLOO
    timeout: timedelta = PATIENCE


class GlooTrainerWeightTransferEngine(NCCLTrainerWeightTransferEngine):
    """The trainer's side: vLLM's engine for NCCL with another group, one weight at a time."""

    model_update_group: Any

    @classmethod
    def trainer_init(  # type: ignore[override]
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        assert source is not None
        engine = cls(client=client, source=source, is_sender=init_info.is_sender, packed=False)
        if not engine.is_sender:
            return engine
        address, port = init_info.master_address, init_info.master_port
        size = init_info.world_size
        to_workers = NCCLWeightTransferInitInfo(
            master_address=address, master_port=port, rank_offset=1, world_size=size
        )
        with ThreadPoolExecutor(max_workers=1) as pool:  # both sides wait for each other
            joined = pool.submit(
                client.init_weight_transfer_engine, worker_init_payload(to_workers)
            )
            try:
                engine.model_update_group = GlooGroup(
                    address, port, rank=0, size=size, timeout=init_info.timeout
                )
            finally:
                joined.result()  # the error of a server says more than that nobody has come
        return engine

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        if not self.is_sender:
            super()._broadcast(source, meta)  # only gathers
            return
        for _, weight in self._checked_iter(source, meta):
            self.model_update_group.broadcast(weight.cpu().contiguous())


WeightTransferEngineFactory.register_engine(GLOO, GlooWeightTransferEngine)
WeightTransferTrainerFactory.register_engine(GLOO, GlooTrainerWeightTransferEngine)


class Source(WeightSource):
    """The trainer's weights as vLLM wants them: names, shapes and dtypes before the first number.

    weights: those of the next sync. dtype: of the engine; weights are rounded before they travel.
    """

    weights: Weights

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, self.dtype, shape) for name, shape in self.weights.shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight.to(self.dtype)) for name, weight in self.weights)


def connect(
    backend: str,
    client: VLLMWeightSyncClient,
    source: Source,
    *,
    address: str,
    port: int,
    workers: int,
    sends: bool,
    timeout: float,
) -> TrainerWeightTransferEngine:
    """The trainer's end of the transfer to all workers of all servers, whose `send_weights` is a
    sync. Every process has one; one of them sends, the others only gather with it.

    backend: nccl or GLOO, as the servers have it. address, port: where they meet, on the machine of
    the process that sends. timeout: of each operation (seconds); NCCL has none.
    """
    terms: dict[str, Any] = dict(
        master_address=address, master_port=port, world_size=1 + workers, rank=0 if sends else 1
    )
    info = NCCLTrainerInitInfo(**terms)
    if backend == GLOO:
        info = GlooTrainerInitInfo(**terms, timeout=timedelta(seconds=timeout))
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
