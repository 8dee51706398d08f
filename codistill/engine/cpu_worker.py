"""vLLM's worker on a CPU, where several processes share one engine."""

from vllm.v1.worker.cpu_worker import CPUWorker


class GlooWorker(CPUWorker):
    """A worker that sums and gathers over gloo, as the trainer's processes do.

    vLLM would take shared memory, under a name that is the same in all runs on a machine: a second
    run could not start, nor one after a run that was killed. It also waits for ever where another
    process has died, and adds up three or more parts in another order in each process, so that
    their sums, and then their samples, may differ.
    """

    def init_device(self) -> None:
        # The end of this address becomes part of that name, and names that differ between the
        # processes leave vLLM with torch.distributed. Nobody connects to it: the group is there.
        self.distributed_init_method = f"rank:{self.rank}"
        super().init_device()
