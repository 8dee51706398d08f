"""vLLM in processes of its own, on this machine or others, reached over HTTP."""

import asyncio
import importlib.util
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx

from codistill import distributed, watching
from codistill.config import ConfigError, require
from codistill.engine.interface import Completion, EngineSpec, Sampling
from codistill.engine.serve import GLOO, LOCAL, sizes
from codistill.engine.vllm_requests import completion, padded_rows_bias, sampling_options
from codistill.model.pretrained import load_model_config
from codistill.model.shards import Weights

CONNECTIONS = 256
"""Requests that a process has under way at a time; chosen, untested."""
ANSWER_SECONDS = 30.0
"""To say what a server is, when nothing else is asked of it; chosen, untested."""
KEY = "rollout.servers"
# No proxy of the environment: servers are near. A connection that has waited may be closed.
OPTIONS: dict[str, Any] = dict(
    trust_env=False, limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=0)
)


class ServerEngine:
    """Requests of this process go to all servers in turn; the first process sends weights to all.

    Process r begins with server r mod K, so that the work of all is spread evenly.
    """

    name = "server"

    def __init__(self, spec: EngineSpec) -> None:
        """Raises ConfigError for a server that does not answer, or that the run cannot use."""
        has_vllm = importlib.util.find_spec("vllm") is not None
        expected = "hf: vLLM, which sends the weights, is not installed here"
        require(has_vllm, "rollout.engine", "server", expected)
        facts = [check_server(url, spec) for url in spec.servers]
        self.spec, self.backend = spec, facts[0]["weight_transfer"]
        for url, found in zip(spec.servers, facts, strict=True):
            expected = f"weight transfer by {self.backend} as the first server has it"
            require(found["weight_transfer"] == self.backend, KEY, url, expected)
        self.servers = Servers(spec.servers, [found["workers"] for found in facts], spec.timeout)
        self.logit_bias = padded_rows_bias(spec, facts[0]["rows"])
        self.transfer: Any = None

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[Completion]:
        bodies = [
            {
                "token_ids": prompt,
                "sampling_params": sampling_options(self.spec, sampling, seed, self.logit_bias),
            }
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [written for answer in asyncio.run(self.write(bodies)) for written in answer]

    async def write(self, bodies: list[dict]) -> list[list[Completion]]:
        """The completions of each prompt."""
        urls, start = self.spec.servers, distributed.rank()
        limit = httpx.Timeout(self.spec.timeout, pool=None)
        async with httpx.AsyncClient(timeout=limit, **OPTIONS) as client:
            return await asyncio.gather(
                *(
                    self.ask(client, urls[(start + number) % len(urls)], body)
                    for number, body in enumerate(bodies)
                )
            )

    async def ask(self, client: httpx.AsyncClient, url: str, body: dict) -> list[Completion]:
        try:
            response = await client.post(f"{url}/inference/v1/generate", json=body)
        except httpx.HTTPError as error:
            raise ServerError(url, error) from error
        choices = content_of(url, response)["choices"]
        reasons = {choice["finish_reason"] for choice in choices}
        if not reasons <= {"stop", "length"}:
            raise ServerError(url, f"a completion has ended by {reasons}")
        return [
            completion(
                self.spec,
                choice["token_ids"],
                [token["logprob"] for token in choice["logprobs"]["content"]],
                choice["finish_reason"],
            )
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]

    def sync(self, weights: Weights) -> None:
        from codistill.engine import transfer  # imports vLLM

        if self.transfer is None:
            self.source = transfer.Source(self.spec.dtype)
        self.source.weights = weights
        with watching.watched("a sync of the servers", self.spec.timeout):
            try:
                if self.transfer is None:
                    self.transfer = self.connected(transfer.connect)
                elif self.spec.sends:
                    self.servers.check_version()
                self.transfer.send_weights()
                if self.spec.sends:
                    self.servers.reset_prefix_cache()
            except Exception as error:
                raise self.servers.cause(error) from error

    def connected(self, connect: Callable[..., Any]) -> Any:
        """The transfer; servers forget the one of an earlier run."""
        address, port = "", 0
        if self.spec.sends:
            self.servers.reset()
            address = own_address(self.spec.servers)
            port = distributed.free_port(address)
        return connect(
            self.backend,
            self.servers,
            self.source,
            address=address,
            port=port,
            workers=sum(self.servers.workers),
            sends=self.spec.sends,
            timeout=self.spec.timeout,
        )

    def sleep(self) -> None:
        """Nothing: its memory is not the trainer's."""

    def wake_up(self) -> None:
        """Nothing: it does not sleep."""

    def close(self) -> None:
        if self.transfer is not None:
            self.transfer.shutdown()


class ServerError(RuntimeError):
    """What happened at a server."""

    def __init__(self, url: str, reason: object) -> None:
        is_late = isinstance(reason, httpx.TimeoutException)
        self.reason = "no answer in time" if is_late else str(reason) or type(reason).__name__
        super().__init__(f"{url}: {self.reason}")


class Servers:
    """What is said to all servers at once: the client that vLLM's weight transfer wants.

    workers: of each server; their numbers in the transfer follow the sender's, 0.
    """

    def __init__(self, urls: Sequence[str], workers: list[int], timeout: float) -> None:
        self.urls, self.workers, self.timeout = urls, workers, timeout
        self.version = ""

    def post(self, path: str, bodies: Sequence[Any] | None = None) -> list[Any]:
        """Answers of all servers; bodies: one for each, None where none has any."""
        with ThreadPoolExecutor(len(self.urls)) as pool:
            return list(
                pool.map(
                    lambda url, body: ask(url, path, body, timeout=self.timeout),
                    self.urls,
                    bodies or [None] * len(self.urls),
                )
            )

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offset, bodies = init_info["rank_offset"], []
        for workers in self.workers:
            bodies.append({"init_info": init_info | {"rank_offset": offset}})
            offset += workers
        self.post("init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self.post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.post("update_weights", [{"update_info": update_info}] * len(self.urls))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.version = weight_version or uuid.uuid4().hex
        self.post("finish_weight_update", [{"weight_version": self.version}] * len(self.urls))

    def reset(self) -> None:
        """End what an earlier run may have left unfinished."""
        self.post("collective_rpc", [{"method": "codistill_reset"}] * len(self.urls))

    def reset_prefix_cache(self) -> None:
        """Forget what old weights made of prompts."""
        for url, answer in zip(self.urls, self.post("reset_prefix_cache"), strict=True):
            if not answer["success"]:
                raise ServerError(url, "the prefix cache is in use: does another run use it?")

    def check_version(self) -> None:
        """Raise ServerError for a server whose weights are not those of the last sync: a transfer
        to it would wait for ever."""
        for url in self.urls:
            found = ask(url, "weight_info", method="GET", timeout=self.timeout)
            if found["weight_version"] != self.version:
                raise ServerError(url, "was started again, or another run uses it")

    def cause(self, error: Exception) -> Exception:
        """The error that is to be told: a server that is gone shows in the transfer to all."""
        for url in self.urls:
            try:
                ask(url, "health", method="GET", timeout=ANSWER_SECONDS)
            except ServerError as silent:
                return silent
        return error


def ask(url: str, path: str, body: Any = None, *, method: str = "POST", timeout: float) -> Any:
    """What a server answers; None if nothing.

    Raises:
        ServerError: it does not answer, or with an error.
    """
    try:
        answer = shared_client().request(method, f"{url}/{path}", json=body, timeout=timeout)
    except httpx.HTTPError as error:
        raise ServerError(url, error) from error
    return content_of(url, answer)


@cache
def shared_client() -> httpx.Client:
    """One for all threads: to make one takes longer than a request."""
    return httpx.Client(**OPTIONS)


def content_of(url: str, response: httpx.Response) -> Any:
    """What is in an answer, of JSON; ServerError where it is that of an error."""
    if response.is_success:
        return response.json() if response.content else None
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text
    first = next(iter(str(message).strip().splitlines()), "")
    raise ServerError(url, f"HTTP {response.status_code}: {first}")


def own_address(urls: Sequence[str]) -> str:
    """The address of this machine that all servers can reach."""
    found = [distributed.address_towards(urlsplit(url).hostname or "") for url in urls]
    return next((address for address in found if address not in LOCAL), found[0])


def check_server(url: str, spec: EngineSpec) -> dict[str, Any]:
    """What a server says of itself.

    Raises:
        ConfigError: it does not answer, or does not run what the trainer's engine would run.
    """
    try:
        ask(url, "health", method="GET", timeout=ANSWER_SECONDS)
    except ServerError as error:
        expected = f"a server that answers: {error.reason}"
        raise ConfigError(f"{KEY} = {url!r}: expected {expected}") from error
    body = {"method": "codistill_facts"}
    try:
        facts = ask(url, "collective_rpc", body, timeout=ANSWER_SECONDS)["results"][0]
    except (ServerError, LookupError, TypeError) as error:
        expected = "a server that `python -m codistill serve` of this version has started"
        raise ConfigError(f"{KEY} = {url!r}: expected {expected}") from error
    for name, ours in sizes(load_model_config("path", spec.path)).items():
        theirs = facts["sizes"].get(name)
        expected = f"{spec.path}, where {name} is {ours}, it runs {facts['model']}: {theirs}"
        require(theirs == ours, KEY, url, expected)
    dtype, length = str(spec.dtype).removeprefix("torch."), spec.max_model_tokens
    require(facts["dtype"] == dtype, KEY, url, f"dtype {dtype}, it has {facts['dtype']}")
    expected = f"room for {length} tokens, it has {facts['max_model_len']} (--max-model-len)"
    require(facts["max_model_len"] >= length, KEY, url, expected)
    mode = "processed_logprobs"
    require(facts["logprobs_mode"] == mode, KEY, url, f"--logprobs-mode {mode}")
    expected = "a server with a tokenizer, for rollout.stop (no --skip-tokenizer-init)"
    require(spec.stop is None or facts["has_tokenizer"], KEY, url, expected)
    transfers = ("nccl", GLOO) if spec.device.type == "cuda" else (GLOO,)
    expected = f"weight transfer by {' or '.join(transfers)}, it has {facts['weight_transfer']}"
    require(facts["weight_transfer"] in transfers, KEY, url, expected)
    require(facts["own_code"], KEY, url, f"{spec.path} in code of vLLM's own, which this one lacks")
    return facts
