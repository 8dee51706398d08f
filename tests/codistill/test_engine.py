"""Both engines, for real: what they sample, what they say of it, and what a sync changes."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from processes import spawn
from tiny import packed_logps
from torch.distributed.tensor import DTensor

from codistill import distributed
from codistill.config import ConfigError
from codistill.config.machinery import TrainingConfig
from codistill.engine import EngineError, EngineSpec, Sampling, make_engine
from codistill.engine.hf import HFEngine
from codistill.engine.in_process import VLLMEngine
from codistill.model.loading import load_policy

VOCAB, END = 18, 1
PROMPTS = [[3, 12, 4, 13], [5, 12, 5, 13], [9, 13]]
CPU = torch.device("cpu")


def logp_gap(engine, policy, temperature: float) -> float:
    """Largest difference between engine and trainer on freshly sampled tokens (nats)."""
    sampling = Sampling(num_generations=16, temperature=temperature, max_tokens=12)
    completions = engine.generate(PROMPTS, [1, 2, 3], sampling)
    prompts = [prompt for prompt in PROMPTS for _ in range(16)]
    ours = packed_logps(policy, prompts, [c.token_ids for c in completions], temperature)
    theirs = torch.tensor([logp for c in completions for logp in c.logps])
    return (ours - theirs).abs().max().item()


def check_engine(rank: int, kind: str, path: str, servers: tuple[str, ...] = ()) -> None:
    distributed.start(timeout=60)
    terms = (path, VOCAB, (END,), 20, torch.float32, CPU)
    engine = make_engine(kind, EngineSpec(*terms, kv_cache_gib=0.1, servers=servers))
    assert engine.name == kind
    policy = load_policy("small.path", path, TrainingConfig(dtype="float32"), VOCAB, CPU)
    if servers:
        engine.sync(policy.full_weights())  # whatever others have left there

    sampling = Sampling(num_generations=16, temperature=1.0, max_tokens=12)
    first = engine.generate(PROMPTS, [1, 2, 3], sampling)
    assert len(first) == 48
    for completion in first:
        tokens = completion.token_ids
        assert len(tokens) == len(completion.logps) and max(tokens) < VOCAB
        assert completion.truncated == (END not in tokens)
        assert END not in tokens[:-1] and (len(tokens) == 12 or tokens[-1] == END)
    assert {completion.truncated for completion in first} == {True, False}
    assert len({tuple(completion.token_ids) for completion in first[:16]}) > 8
    assert engine.generate(PROMPTS, [1, 2, 3], sampling) == first
    assert engine.generate(PROMPTS, [4, 5, 6], sampling) != first
    greedy = Sampling(num_generations=1, temperature=0.0, max_tokens=12)
    tokens = [c.token_ids for c in engine.generate(PROMPTS, [1, 2, 3], greedy)]
    assert tokens == [c.token_ids for c in engine.generate(PROMPTS, [4, 5, 6], greedy)]

    assert max(logp_gap(engine, policy, 1.0), logp_gap(engine, policy, 0.7)) < 1e-4
    for part in ("embed_tokens", "layers.1", "norm"):
        policy.reshard()  # the gathered weights of the forward pass above are not the parameters
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if part in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    local.add_(0.3 * noise)
        assert logp_gap(engine, policy, 1.0) > 1e-2, part  # the engine does not know yet
        engine.sync(policy.full_weights())
        assert logp_gap(engine, policy, 1.0) < 1e-4, part
    engine.close()


@pytest.mark.parametrize("kind", ["vllm", "hf"])
@pytest.mark.parametrize("model", ["small", "large"], ids=["tied", "untied"])
def test_engine_samples_what_it_says_and_syncs(models, kind, model):
    if kind == "vllm":
        pytest.importorskip("vllm", reason="vLLM cannot be installed on this machine")
    spawn(check_engine, kind, str(models[model]), processes=1)


@pytest.mark.parametrize("method", ["generate", "sync"])
def test_an_engine_that_fails_once_starts_again_and_changes_nothing(
    make_trainer, monkeypatch, caplog, method
):
    def fail(*arguments):
        if method == "sync":
            next(arguments[0])  # a part of the weights has been taken
        raise RuntimeError("no memory")

    def loss(trainer, step: int) -> float:
        return trainer.step(step)[0]["loss/small"]

    whole, trainer = make_trainer(), make_trainer()
    monkeypatch.setattr(trainer.engine.engine, method, fail)
    assert [loss(trainer, step) for step in (1, 2)] == [loss(whole, step) for step in (1, 2)]
    text = f"engine hf failed in {method} on rank 0: no memory"
    assert [line for line in caplog.messages if "engine" in line] == [f"{text}; starting it again"]
    monkeypatch.setattr(trainer.engine.engine, method, fail)
    with pytest.raises(EngineError, match=f"^{text}$"):
        trainer.step(3)


def test_vllm_is_not_started_again(make_trainer, monkeypatch):
    class Broken(HFEngine):
        name = VLLMEngine.name

        def generate(self, prompts, seeds, sampling):
            raise RuntimeError("no memory")

    monkeypatch.setattr("codistill.engine.choice.HFEngine", Broken)
    with pytest.raises(EngineError, match="engine vllm failed in generate on rank 0: no memory"):
        make_trainer().step(1)


class Recorder:
    """Writes down the methods that are called, with their keywords, and calls another object's."""

    def __init__(self, calls: list, of: object = None) -> None:
        self.calls, self.of = calls, of

    def __getattr__(self, name: str):
        def method(*arguments, **keywords):
            self.calls.append((name, keywords) if keywords else name)
            return self.of and getattr(self.of, name)(*arguments, **keywords)

        return method


@pytest.mark.parametrize("sleeps", [True, False])
def test_an_engine_sleeps_from_the_rollouts_to_the_sync(make_trainer, monkeypatch, sleeps):
    calls: list = []
    trainer = make_trainer()  # with rollout.sleep it would want a GPU
    trainer.engine.spec = replace(trainer.engine.spec, sleeps=sleeps)
    trainer.engine.engine = Recorder(calls, trainer.engine.engine)
    for name in ("score", "update"):
        call = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda *a, f=call, n=name: (calls.append(n), f(*a))[1])
    trainer.step(1)
    expected = ["generate", "sleep", "score", "update", "update", "wake_up", "sync"]
    assert calls == [name for name in expected if sleeps or name not in ("sleep", "wake_up")]


def test_how_vllm_sleeps(monkeypatch):
    calls: list = []

    def llm(**options):
        assert options["enable_sleep_mode"] is True
        assert options["generation_config"] == "vllm"  # not the model's own, with its penalties
        assert options["logprobs_mode"] == "processed_logprobs"
        model = SimpleNamespace(
            get_vocab_size=lambda: VOCAB,
            architectures=["Any"],
            using_transformers_backend=lambda: False,
        )
        recorder = Recorder(calls)
        recorder.llm_engine = SimpleNamespace(model_config=model)
        return recorder

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    device = torch.device("cuda")
    spec = EngineSpec("org/model", VOCAB, (END,), 20, torch.bfloat16, device, 0.1, sleeps=True)
    engine = VLLMEngine(spec)
    engine.sleep()
    engine.wake_up()
    assert calls == [("sleep", {"level": 1}), "empty_cache", "wake_up"]


@pytest.mark.parametrize(
    ("message", "error", "expected"),
    [
        (  # as vLLM 0.32 has it
            "To serve at least one request with the model's max seq len (20), (0.2 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (0.1 GiB). Based on the "
            "available memory, the estimated maximum model length is 16. Try increasing",
            ConfigError,
            "kv_cache_gib = 0.1: expected room for a sequence of 20 tokens, prompt and "
            "completion, there is room for 16",
        ),
        ("another mistake", ValueError, "another mistake"),
    ],
)
def test_a_cache_without_room_for_a_sequence(monkeypatch, message, error, expected):
    def llm(**options):
        raise ValueError(message)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm))
    for section in ("rollout.", ""):
        gpu = torch.device(
            "cuda"
        )  # on the CPU it would switch torch.compile off for all later tests
        terms = ("org/model", VOCAB, (END,), 20, torch.bfloat16, gpu, 0.1)
        with pytest.raises(error, match=f"^{section * (error is ConfigError)}{expected}$"):
            VLLMEngine(EngineSpec(*terms, section=section))


def test_how_hf_sleeps(models, monkeypatch):
    engine = HFEngine(EngineSpec(str(models["small"]), VOCAB, (END,), 20, torch.float32, CPU, 0.1))
    gpu = torch.device("cuda", 1)
    engine.spec = replace(engine.spec, device=gpu)
    places: list = []
    monkeypatch.setattr(engine.policy, "to", places.append)
    engine.sleep()
    engine.wake_up()
    assert places == ["cpu", gpu]


def test_hf_samples_without_the_penalties_of_the_model(models, tmp_path):
    """Its generation_config.json is for chatting: what is trained is softmax(logits / T)."""
    folder = tmp_path / "model"
    shutil.copytree(models["small"], folder)
    options = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "top_k": 1}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END} | options))
    terms = (VOCAB, (END,), 20, torch.float32, CPU, 0.1)
    engines = [HFEngine(EngineSpec(str(path), *terms)) for path in (models["small"], folder)]
    sampling = Sampling(num_generations=8, temperature=1.0, max_tokens=12)
    plain, penalized = (engine.generate(PROMPTS, [1, 2, 3], sampling) for engine in engines)
    assert plain == penalized


def test_a_prompt_that_a_step_draws_twice_gets_other_rollouts(make_trainer):
    trainer = make_trainer({"rollout": {"prompts_per_step": 16}})  # of 8 problems
    _, rollouts, _ = trainer.step(1)
    written: dict[str, set] = {}
    for row, problem in enumerate(rollouts.problems):
        ids = rollouts.completions.rows(torch.tensor([row])).values.tolist()
        written.setdefault(problem.problem, set()).add(tuple(ids))
    assert len(written) == 8
    assert max(map(len, written.values())) > 6  # six are of one draw


def test_sleep_without_a_gpu_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="^rollout.sleep = True: expected false: there is no GPU"):
        make_trainer({"rollout": {"sleep": True}})
