"""A server that stands in for vLLM's, and what a right one answers."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from test_engine import END

from codistill.engine import EngineSpec
from codistill.engine.serve import GLOO, sizes
from codistill.model.pretrained import load_model_config


def facts_of(spec: EngineSpec) -> dict:
    """What a right server for `spec` says of itself."""
    return {
        "model": spec.path,
        "sizes": sizes(load_model_config("small.path", spec.path)),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "max_model_len": spec.max_model_tokens,
        "logprobs_mode": "processed_logprobs",
        "has_tokenizer": False,
        "rows": 24,
        "weight_transfer": GLOO,
        "workers": 1,
        "own_code": True,
    }


def written(body: dict) -> dict:
    """What vLLM answers to a request for completions: the prompt's first token, then the end."""
    choices = []
    for index in range(body["sampling_params"]["n"]):
        token_ids = [body["token_ids"][0], *[2] * index, END]
        content = [{"token_id": token, "logprob": -0.5 * token} for token in token_ids]
        choices.append(
            {
                "index": index,
                "token_ids": token_ids,
                "logprobs": {"content": content},
                "finish_reason": "stop",
            }
        )
    return {"choices": choices[::-1]}


@contextmanager
def stand_in(answers: dict[str, Any]) -> Iterator[tuple[str, list]]:
    """A server with these answers by path, and the requests that it gets, (path, body).

    An answer is JSON, (status, JSON), or a function of the request's body that gives one.
    """
    requests: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(content) if content else None
            requests.append((self.path, body))
            answer = answers.get(self.path, (404, {"detail": "Not Found"}))
            answer = answer(body) if callable(answer) else answer
            status, answer = answer if isinstance(answer, tuple) else (200, answer)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            try:
                self.end_headers()
                self.wfile.write(text)
            except ConnectionError:  # the client did not wait
                pass

        do_GET = do_POST

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()


def right_answers(facts: dict) -> dict[str, Any]:
    return {
        "/health": {},
        "/collective_rpc": {"results": [facts]},
        "/inference/v1/generate": written,
    }


def update_answers(facts: dict) -> dict[str, Any]:
    """Answers of a server that remembers the version of its weights."""
    version = {"weight_version": "default"}
    return right_answers(facts) | {
        "/finish_weight_update": lambda body: version.update(body) or {},
        "/weight_info": lambda body: dict(version),
        "/reset_prefix_cache": {"success": True},
    }
