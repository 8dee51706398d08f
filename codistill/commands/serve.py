"""python -m codistill serve --config FILE [--port 8001] [--section.key value ...]

Start a server that writes the rollouts of a configuration, for rollout.engine = server: print the
command, and become it. vLLM's routes for weights are open at its address without a password: they
belong on the loopback interface or in a network of machines that trust each other.
"""

import os

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from codistill import distributed
from codistill.config import Config, load_config
from codistill.downloads import is_here
from codistill.versions import check_vllm


class ServeOptions(Config):
    """Start a server that writes the rollouts of this configuration, for rollout.engine server.

    --config FILE reads a YAML file; the options below win over it.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m codistill serve")

    port: int = Field(8001, gt=0, lt=2**16, description="where the server listens")
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="address at which the server listens; whoever reaches it can replace its "
        "weights and stop it",
    )


def main(arguments: list[str]) -> None:
    """Print the command of the server and become it."""
    options = load_config(arguments, ServeOptions)
    key, model = f"{options.writer}.path", options.model(options.writer)
    is_here(key, model.path)
    check_vllm("command", "serve")
    import torch

    from codistill.engine.serve import GLOO, LOCAL, ServeCommand, environment_of

    has_gpu, rollout = torch.cuda.is_available(), options.rollout
    command = ServeCommand(
        path=model.path,
        dtype=options.training.dtype,
        max_model_tokens=rollout.max_prompt_tokens + rollout.max_completion_tokens,
        kv_cache_gib=rollout.kv_cache_gib,
        has_tokenizer=bool(rollout.stop),
        has_gpu=has_gpu,
        tensor_parallel=rollout.tensor_parallel,
        transfer="nccl" if has_gpu else GLOO,
        host=options.host,
        port=options.port,
    )
    if options.host not in LOCAL:
        distributed.complain(
            f"host = {options.host!r}: whoever reaches this address can replace the weights of the "
            "server and stop it; expected a network of machines that trust each other"
        )
    print(command, flush=True)
    os.execve(command.arguments[0], command.arguments, environment_of(command))
