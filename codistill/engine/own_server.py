"""A server that a run starts for itself, for a while: vLLM cannot start twice in one process."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from codistill import distributed
from codistill.child import Child
from codistill.engine.interface import EngineError, EngineSpec
from codistill.engine.serve import GLOO, ServeCommand, environment_of
from codistill.engine.server import ServerError, ask

ADDRESS = "127.0.0.1"
PAUSE = 0.5  # seconds between two looks at whether it answers
HEALTH_SECONDS = 10.0  # to say that it is there; chosen, untested


@contextmanager
def own_server(spec: EngineSpec, log: Path) -> Iterator[EngineSpec]:
    """Run a server of the model on this node; what an engine at it must know. Collective.

    One server per node, which is the fewest that all processes of a node can reach on the loopback
    interface: the first process of the node starts it, on its own GPU, or on the first GPUs of the
    node if `spec.tensor_parallel` is more than 1, and sends it the weights, by gloo, because NCCL
    does not connect a GPU with itself. It is gone when the block ends, or the process.

    log: the file for what it prints.

    Raises:
        EngineError: on all processes, if a server has not started within `spec.timeout` seconds.
    """
    starts = distributed.local_rank() == 0
    child: Child | None = None
    url, error = "", None  # the other processes of the node have neither
    try:
        try:
            if starts:
                command = own_command(spec)
                url = f"http://{command.host}:{command.port}"
                environment = environment_of(command)
                if gpus := own_gpus(spec):
                    environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
                child = Child(command.arguments, environment, log)
                wait_for(child, url, spec.timeout, log)
        except Exception as failure:  # none may keep the others waiting
            error = failure
        if message := distributed.first_error(error):
            raise EngineError(f"the server for {spec.path} did not start on {message}")
        urls = distributed.gathered(url)
        first = distributed.rank() - distributed.local_rank()
        yield replace(spec, servers=(urls[first],), sends=starts)
    finally:
        if child is not None:
            child.end()


def own_command(spec: EngineSpec) -> ServeCommand:
    """The command of the server."""
    return ServeCommand(
        path=spec.path,
        dtype=str(spec.dtype).removeprefix("torch."),
        max_model_tokens=spec.max_model_tokens,
        kv_cache_gib=spec.kv_cache_gib,
        has_tokenizer=spec.stop is not None,
        has_gpu=spec.device.type == "cuda",
        tensor_parallel=len(own_gpus(spec)) or 1,
        transfer=GLOO,
        host=ADDRESS,
        port=distributed.free_port(ADDRESS),
    )


def own_gpus(spec: EngineSpec) -> list[str]:
    """The GPUs that a server on this node may see, as CUDA_VISIBLE_DEVICES names them; none on a
    CPU."""
    if spec.device.type != "cuda":
        return []
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(here)))
    return visible.split(",")[: min(spec.tensor_parallel, here)]


def wait_for(child: Child, url: str, seconds: float, log: Path) -> None:
    """Wait until the server answers.

    Raises:
        RuntimeError: it has ended, or does not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            ask(url, "health", method="GET", timeout=HEALTH_SECONDS)
            return
        except ServerError as error:
            if not child.is_running:
                raise RuntimeError(f"it has ended; its output is in {log}") from error
            if time.monotonic() > deadline:
                limit = f"it does not answer within {seconds:g} s (distributed.timeout)"
                raise RuntimeError(f"{limit}; its output is in {log}") from error
        time.sleep(PAUSE)
