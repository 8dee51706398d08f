"""rollout.engine server: what is asked of servers, and what is said of those that fail."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from stand_in import facts_of, right_answers, stand_in
from test_engine import END, PROMPTS, VOCAB

from codistill import distributed
from codistill.commands import doctor, serve
from codistill.config import Config, ConfigError, load_config
from codistill.config.plan import PlanOptions
from codistill.dry_run import dry_run
from codistill.engine import EngineSpec, Sampling
from codistill.engine.server import (
    ServerEngine,
    ServerError,
    Servers,
    check_server,
    own_address,
    shared_client,
)
from codistill.model.shape import model_shape
from codistill.planning import phase_bytes, rollout_seconds
from codistill.texts import StopStrings

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({"engine": "server"}, "rollout.servers = []: expected the URLs of engine server"),
        ({"engine": "hf", "servers": ["http://a"]}, "expected none with engine hf"),
        ({"servers": ["http://a"]}, "expected none with engine auto"),
        ({"engine": "server", "servers": ["a:8001"]}, "expected a URL such as http"),
        ({"engine": "server", "servers": ["ftp://a:1"]}, "expected a URL such as http"),
        ({"engine": "server", "servers": ["http://a:99999"]}, "expected a URL such as http"),
        ({"engine": "server", "servers": ["http://u:p@a:1"]}, "expected a URL such as http"),
        ({"engine": "server", "servers": ["http://a/v1"]}, "expected a URL such as http"),
        ({"engine": "server", "servers": ["http://a:1", "http://a:1/"]}, "each server once"),
        (
            {"engine": "server", "servers": ["http://a:1"], "sleep": True},
            "rollout.sleep = True: expected false with engine server",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(settings, tmp_path, rollout, expected):
    settings["rollout"] |= {"engine": "auto"} | rollout
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match="^rollout.s[a-z]+ = ") as error:
        load_config(["--config", str(tmp_path / "config.yaml")])
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_addresses(settings):
    urls = ["http://127.0.0.1:8001", "https://node-7.cluster/", "http://[::1]:8001"]
    settings["rollout"] |= {"engine": "server", "servers": urls}
    assert Config(**settings).rollout.servers == urls


@pytest.fixture
def spec(models) -> EngineSpec:
    return EngineSpec(str(models["small"]), VOCAB, (END,), 20, torch.float32, CPU, 0.1, timeout=5)


@pytest.fixture
def facts(spec) -> dict:
    return facts_of(spec)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "bfloat16"}, "expected dtype float32, it has bfloat16"),
        ({"max_model_len": 19}, "expected room for 20 tokens, it has 19"),
        ({"max_model_len": 64}, None),
        ({"logprobs_mode": "raw_logprobs"}, "expected --logprobs-mode processed_logprobs"),
        ({"weight_transfer": None}, "expected weight transfer by codistill_gloo, it has None"),
        ({"weight_transfer": "nccl"}, "expected weight transfer by codistill_gloo, it has nccl"),
        ({"own_code": False}, "in code of vLLM's own"),
        ({"sizes": {"hidden_size": 64}}, "where hidden_size is 32, it runs "),
        ({"sizes": {"rope_theta": 1.0}}, "where rope_theta is 10000.0, it runs "),
        ({}, None),
    ],
)
def test_a_server_that_a_run_cannot_use_is_named(spec, facts, changes, expected):
    changed = facts | changes | {"sizes": facts["sizes"] | changes.get("sizes", {})}
    with stand_in(right_answers(changed)) as (url, _):
        if expected is None:
            assert check_server(url, spec) == changed
            return
        with pytest.raises(ConfigError, match=f"^rollout.servers = '{url}': ") as error:
            check_server(url, spec)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_server_needs_a_tokenizer_to_see_stop_strings(spec, facts, tokenizer):
    stopped = replace(spec, stop=StopStrings(tokenizer, ("=",)))
    with stand_in(right_answers(facts)) as (url, _):
        with pytest.raises(ConfigError, match="a server with a tokenizer, for rollout.stop"):
            check_server(url, stopped)
    changed = facts | {"has_tokenizer": True}
    with stand_in(right_answers(changed)) as (url, _):
        assert check_server(url, stopped) == changed


def test_servers_take_weights_in_one_way(spec, facts):
    on_gpu = replace(spec, device=torch.device("cuda"))
    by_nccl = right_answers(facts | {"weight_transfer": "nccl"})
    with stand_in(by_nccl) as (one, _), stand_in(right_answers(facts)) as (two, _):
        assert ServerEngine(replace(on_gpu, servers=(one,))).backend == "nccl"
        expected = f"'{two}': expected weight transfer by nccl as the first server has it"
        with pytest.raises(ConfigError, match=expected):
            ServerEngine(replace(on_gpu, servers=(one, two)))


def test_servers_are_reached_without_a_proxy(spec, facts, monkeypatch):
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    shared_client.cache_clear()
    with stand_in(right_answers(facts)) as (url, _):
        engine = ServerEngine(replace(spec, servers=(url,)))
        assert len(engine.generate(PROMPTS, [1, 2, 3], Sampling(1, 1.0, 4))) == 3
    shared_client.cache_clear()


def test_a_request_waits_for_its_turn_without_a_limit(spec, facts, monkeypatch):
    """With many prompts the last request starts late; `timeout` is the limit of an answer."""
    limits: list = []

    class Client(httpx.AsyncClient):
        def __init__(self, *, timeout: httpx.Timeout, **options: Any) -> None:
            limits.append((timeout.read, timeout.pool))
            super().__init__(timeout=timeout, **options)

    monkeypatch.setattr(httpx, "AsyncClient", Client)
    with stand_in(right_answers(facts)) as (url, _):
        ServerEngine(replace(spec, servers=(url,))).generate(PROMPTS, [1] * 3, Sampling(1, 1.0, 4))
    assert limits == [(5, None)]


def test_a_server_of_another_kind_or_none_is_named(spec):
    with stand_in({"/health": {}}) as (url, _):
        with pytest.raises(ConfigError, match=f"'{url}': expected a server that `python -m"):
            check_server(url, spec)
    with pytest.raises(ConfigError, match=f"'{url}': expected a server that answers: .*refused"):
        check_server(url, spec)


def test_doctor_says_which_servers_can_be_used(spec, facts, capsys):
    with stand_in(right_answers(facts)) as (url, _), stand_in({}) as (other, _):
        with pytest.raises(ConfigError, match=f"'{other}': expected a server that answers"):
            doctor.check_servers(replace(spec, servers=(other, url)))
    assert capsys.readouterr().out.splitlines() == [
        f"server {other} cannot be used",
        f"server {url} runs {spec.path}",
    ]


def test_requests_are_spread_and_say_what_vllm_is_to_do(spec, facts, monkeypatch):
    counts = []
    for rank in range(2):  # the processes of a run have as many prompts each
        monkeypatch.setenv("RANK", str(rank))
        answers = right_answers(facts)
        with stand_in(answers) as (one, first), stand_in(answers) as (two, second):
            engine = ServerEngine(replace(spec, servers=(one, two)))
            found = engine.generate(PROMPTS, [4, 5, 6], Sampling(2, 0.7, 9))
        assert [completion.token_ids[0] for completion in found] == [3, 3, 5, 5, 9, 9]
        assert [len(completion.token_ids) for completion in found] == [2, 3] * 3
        assert found[2].logps == [-2.5, -0.5] and not found[2].truncated
        asked = [[body for path, body in part if "generate" in path] for part in (first, second)]
        counts.append([len(part) for part in asked])
        by_seed = {body["sampling_params"]["seed"]: body for part in asked for body in part}
        assert [by_seed[seed]["token_ids"] for seed in (4, 5, 6)] == PROMPTS
        for body in by_seed.values():
            terms = body["sampling_params"]
            assert (terms["n"], terms["temperature"], terms["max_tokens"]) == (2, 0.7, 9)
            assert terms["logit_bias"] == {str(row): -100.0 for row in range(VOCAB, 24)}
    assert counts == [[2, 1], [1, 2]]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((500, {"error": {"message": "no memory\nat all"}}), "HTTP 500: no memory$"),
        (lambda body: time.sleep(2) or {}, "no answer in time$"),
        (lambda body: {"choices": [{"finish_reason": "abort"}]}, "ended by {'abort'}"),
    ],
    ids=["error", "hangs", "aborts"],
)
def test_a_server_that_fails_is_named(spec, facts, answer, expected):
    answers = right_answers(facts) | {"/inference/v1/generate": answer}
    with stand_in(answers) as (url, _):
        engine = ServerEngine(replace(spec, servers=(url,), timeout=0.5))
        with pytest.raises(ServerError, match=f"^{url}: .*{expected}"):
            engine.generate(PROMPTS, [1, 2, 3], Sampling(1, 1.0, 4))
    with pytest.raises(ServerError, match=f"^{url}: All connection attempts failed"):
        engine.generate(PROMPTS, [1, 2, 3], Sampling(1, 1.0, 4))


def test_workers_of_all_servers_have_numbers_of_their_own():
    with stand_in({"/init_weight_transfer_engine": {}}) as (one, first):
        with stand_in({"/init_weight_transfer_engine": {}}) as (two, second):
            servers = Servers((one, two), [4, 2], timeout=5)
            servers.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    offsets = [body["init_info"]["rank_offset"] for _, body in (*first, *second)]
    assert offsets == [1, 5]


def test_a_server_with_other_weights_is_named():
    answers: dict = {"/finish_weight_update": {}}
    with stand_in(answers) as (url, requests):
        servers = Servers((url,), [1], timeout=5)
        servers.finish_weight_update()
        for version in ("default", "of another run"):
            answers["/weight_info"] = {"weight_version": version}
            with pytest.raises(ServerError, match=f"^{url}: was started again, or another run"):
                servers.check_version()
        answers["/weight_info"] = dict(requests[0][1])
        servers.check_version()
        answers["/reset_prefix_cache"] = {"success": False}
        with pytest.raises(ServerError, match=f"^{url}: the prefix cache is in use"):
            servers.reset_prefix_cache()


def test_the_address_that_all_servers_reach(monkeypatch):
    addresses = {"127.0.0.1": "127.0.0.1", "node-7": "10.0.0.5"}
    monkeypatch.setattr(distributed, "address_towards", addresses.get)
    local, remote = "http://127.0.0.1:8001", "http://node-7:8001"
    assert own_address([local]) == "127.0.0.1"
    assert own_address([local, remote]) == own_address([remote, local]) == "10.0.0.5"


def test_serve_prints_its_command_and_becomes_it(settings, tmp_path, monkeypatch, capsys):
    calls: list = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("RANK", "0")
    settings["rollout"]["stop"] = ["</answer>"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--port", "8007"]
    serve.main(arguments)
    out, err = capsys.readouterr()
    ((program, words, environment),) = calls
    assert program == sys.executable and err == ""
    assert out.startswith("VLLM_SERVER_DEV_MODE=1 ") and environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "RANK" not in environment
    text = " ".join(words)
    for option in (
        f"--model {settings['small']['path']} --host 127.0.0.1 --port 8007 --dtype float32",
        "--max-model-len 16",
        "--logprobs-mode processed_logprobs",
        "--generation-config vllm",
    ):
        assert option in text
    assert "--skip-tokenizer-init" not in words and "trust" not in text
    serve.main([*arguments, "--host", "0.0.0.0"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "host = '0.0.0.0': whoever reaches this address" in line


def test_a_dry_run_needs_no_server(settings, monkeypatch, capsys):
    monkeypatch.setattr("codistill.versions.has_vllm", lambda: True)
    settings["rollout"] |= {"engine": "server", "servers": ["http://127.0.0.1:1"]}
    dry_run(Config(**settings))
    assert "1 on cpu, rollout engine server" in capsys.readouterr().out


def test_plan_has_no_engine_beside_the_models_and_shares_rollouts_over_servers(settings):
    settings["rollout"] |= {"engine": "vllm", "prompts_per_step": 8}
    own = PlanOptions(**settings, machine={"gpus": 2})
    served = {"engine": "server", "servers": ["http://a:1", "http://b:1"]}
    settings["rollout"] |= served
    apart = PlanOptions(**settings, machine={"gpus": 4})
    shapes = {name: model_shape(f"{name}.path", own.model(name).path) for name in own.loaded}
    assert phase_bytes(own, shapes, "rollout")["engine"] > 0
    assert phase_bytes(apart, shapes, "rollout")["engine"] == 0
    times = [rollout_seconds(options, shapes["small"]) for options in (own, apart)]
    assert times[0] == times[1]
