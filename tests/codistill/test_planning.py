"""`python -m codistill plan`: its formulas against what a CPU allocates, and by hand."""

import json

import pytest
import torch
import torch.distributed as dist
import transformers
from processes import spawn
from torch.profiler import ProfilerActivity, profile

from codistill.batch import Ragged, TokenBatch
from codistill.commands import plan
from codistill.config import ConfigError, load_config
from codistill.config.machinery import DistributedConfig, TrainingConfig
from codistill.config.plan import PlanOptions
from codistill.model.policy import prepare
from codistill.model.shape import ModelShape, model_shape
from codistill.planning import (
    GIB,
    fitting,
    pass_seconds,
    phases,
    rollout_seconds,
    update_bytes,
)
from codistill_kernels import PolicyLoss
from codistill_kernels._linear import slab_sizes

SEQUENCES, PROMPT, COMPLETION = 4, 64, 192
TOKENS, COMPLETION_TOKENS = SEQUENCES * (PROMPT + COMPLETION), SEQUENCES * COMPLETION
TINY = dict(
    hidden_size=256,
    intermediate_size=768,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
CASES = {
    "layers": ("bfloat16", "none", dict(TINY, num_hidden_layers=6, vocab_size=1024)),
    "selective": ("bfloat16", "selective", dict(TINY, num_hidden_layers=6, vocab_size=1024)),
    "full": ("bfloat16", "full", dict(TINY, num_hidden_layers=6, vocab_size=1024)),
    "head": ("float32", "none", dict(TINY, num_hidden_layers=2, vocab_size=8192)),
}


def train_twice(case: str) -> None:
    """Two steps of two micro-batches: the second step finds Adam's moments, and its second
    micro-batch the gradients of the first."""
    dtype, checkpointing, sizes = CASES[case]
    options = TrainingConfig(dtype=dtype, gradient_checkpointing=checkpointing)
    lm = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**sizes))
    policy = prepare(lm, options, sizes["vocab_size"], torch.device("cpu"))
    rows = Ragged.of([[1] * PROMPT] * SEQUENCES), Ragged.of([[2] * COMPLETION] * SEQUENCES)
    batch = TokenBatch.build(*rows, list(range(SEQUENCES)), torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters())
    for _ in range(2):
        for is_last in (False, True):
            policy.reduce_head(is_last)
            loss, _ = policy.policy_loss(
                batch,
                1.0,
                loss=PolicyLoss(),
                old_logps=torch.zeros(COMPLETION_TOKENS),
                advantages=torch.ones(SEQUENCES),
                normalizer=1.0,
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peak_bytes(case: str) -> int:
    """The most that torch's allocator has given out at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_twice(case)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def peak_of_a_process(rank: int, folder: str, case: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    found = peak_bytes(case)
    if rank == 0:
        torch.save(found, f"{folder}/peak.pt")
    dist.barrier()
    dist.destroy_process_group()


def shape_of(folder, **sizes) -> ModelShape:
    config = transformers.Qwen2Config(**sizes, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder)
    return model_shape("small.path", str(folder))


def predicted_bytes(case: str, folder, processes: int) -> float:
    dtype, checkpointing, sizes = CASES[case]
    shape = shape_of(folder, **sizes)
    update = update_bytes(
        shape,
        TOKENS,
        COMPLETION_TOKENS,
        2 if dtype == "bfloat16" else 4,
        processes=processes,
        checkpointing=checkpointing,
    )
    return (4 + 8) * shape.parameters / processes + sum(update.values())


@pytest.mark.parametrize("case", CASES)
def test_memory_of_an_update(process_group, tmp_path, monkeypatch, case):
    monkeypatch.setattr(slab_sizes, "SLAB_BYTES", 0)  # a GPU's
    assert predicted_bytes(case, tmp_path, 1) == pytest.approx(peak_bytes(case), rel=0.15)


def test_memory_of_an_update_by_two_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_sizes, "SLAB_BYTES", 0)
    spawn(peak_of_a_process, str(tmp_path), "layers", processes=2)
    measured = torch.load(tmp_path / "peak.pt")
    assert predicted_bytes("layers", tmp_path, 2) == pytest.approx(measured, rel=0.15)


@pytest.fixture
def paper(tmp_path):
    """load(*arguments): the paper's configuration, on folders with configurations alone."""
    sizes = {
        "small": dict(hidden=1536, mlp=8960, heads=12, keys=2, vocab=151936, tied=True),
        "large": dict(hidden=3584, mlp=18944, heads=28, keys=4, vocab=152064, tied=False),
    }
    for name, size in sizes.items():
        shape_of(
            tmp_path / name,
            hidden_size=size["hidden"],
            intermediate_size=size["mlp"],
            num_hidden_layers=28,
            num_attention_heads=size["heads"],
            num_key_value_heads=size["keys"],
            vocab_size=size["vocab"],
            tie_word_embeddings=size["tied"],
        )
    paths = [f"--{name}.path={tmp_path / name}" for name in sizes]
    start = ["--config", "configs/qwen2.5_math.yaml", *paths]
    return lambda *arguments: [*start, *arguments]


def shapes_of(options: PlanOptions) -> dict[str, ModelShape]:
    return {n: model_shape(f"{n}.path", options.model(n).path) for n in options.loaded}


def test_shapes_of_the_papers_models(paper):
    small, large = shapes_of(load_config(paper(), PlanOptions)).values()
    assert small.parameters == 1_543_714_304  # as in their model cards: 1.54 and 7.61 billion
    assert large.parameters == 7_615_616_512
    assert small.multiplied == small.parameters and small.is_tied
    assert large.multiplied == large.parameters - 152064 * 3584
    assert large.key_width == 4 * 128 and large.norm_width == 2 * 3584
    assert large.layer_parameters * 28 + large.root_parameters == large.parameters


def test_weights_and_optimizer_by_hand(paper):
    options = load_config(paper("--machine.gpus", "8"), PlanOptions)
    parameters = 1_543_714_304 + 7_615_616_512
    for phase in phases(options, shapes_of(options)):
        assert phase.parts["weights"] == 4 * parameters / 8
        assert phase.parts["optimizer"] == 8 * parameters / 8
        assert phase.parts["engine"] == 2 * 1_543_714_304 + (16 + 2) * GIB


def test_what_is_on_the_host_is_not_on_the_gpu(paper):
    """With one GPU: the optimizer's step of the large model takes 8 P and the gradients 4 P."""
    shapes = shapes_of(load_config(paper(), PlanOptions))
    large = shapes["large"].parameters
    found = {}
    for offload in ("optimizer", "all"):
        arguments = paper("--machine.gpus", "1", "--training.offload", offload)
        planned = phases(load_config(arguments, PlanOptions), shapes)
        found[offload] = {phase.name: phase.parts for phase in planned}
    assert found["optimizer"]["score"]["optimizer"] == 0
    update = found["optimizer"]["update large"]
    assert (update["optimizer"], update["gradients"]) == (8 * large, 4 * large)
    assert found["all"]["update large"]["weights"] == found["all"]["sync"]["optimizer"] == 0
    assert found["all"]["update large"]["gradients"] == 4 * shapes["large"].root_parameters


def test_an_engine_that_sleeps_keeps_its_graphs_alone(paper):
    options = load_config(paper("--rollout.sleep", "true"), PlanOptions)
    engine = {phase.name: phase.parts["engine"] for phase in phases(options, shapes_of(options))}
    awake = 2 * 1_543_714_304 + (16 + 2) * GIB
    assert engine == {
        "rollout": awake,
        "score": 2 * GIB,
        "update small": 2 * GIB,
        "update large": 2 * GIB,
        "sync": awake,
    }


def test_a_shared_engine_by_hand(paper):
    """Two GPUs per engine: half of the weights on each, twice the sequences in each iteration."""
    alone = load_config(paper(), PlanOptions)
    shared = load_config(paper("--rollout.tensor_parallel", "2"), PlanOptions)
    shapes = shapes_of(alone)
    writer = shapes["small"]
    for phase in phases(shared, shapes):
        assert phase.parts["engine"] == 1_543_714_304 + (16 + 2) * GIB
    sizes = ("--machine.mean_completion_tokens", "3072", "--rollout.prompts_per_step", "8")
    alone, shared = (
        load_config(paper(*sizes, *more), PlanOptions)
        for more in ((), ("--rollout.tensor_parallel", "2"))
    )
    # 8 GPUs: 14 sequences each, or 28 per pair, of 3072 tokens; both read the same keys and values.
    saved = 2 * writer.multiplied / 2 / (0.7 * 3.35e12)
    sums = 2 * 28 * (2 * writer.hidden * 28 / 360e9 + 1e-5)
    prefill = 2 * 28 * (2 * writer.hidden * 2 * 150 / 360e9 + 1e-5)
    expected = rollout_seconds(alone, writer) - 3072 * (saved - sums) + prefill
    assert rollout_seconds(shared, writer) == pytest.approx(expected)


def test_replicas_by_hand(paper):
    """64 GPUs of 8 nodes. Each node has all weights and gathers them by NVLink, at 0.8 * 450 GB/s;
    gradients are summed over nodes, at 0.8 * 50 GB/s."""
    sizes = ("--machine.gpus", "64", "--rollout.prompts_per_step", "64")
    apart = load_config(paper(*sizes, "--distributed.replicas", "8"), PlanOptions)
    together, shapes = load_config(paper(*sizes), PlanOptions), shapes_of(apart)
    for one, other in zip(phases(apart, shapes), phases(together, shapes), strict=True):
        assert one.parts["weights"] == 8 * other.parts["weights"]
        assert one.parts["optimizer"] == 8 * other.parts["optimizer"]
    large = shapes["large"]
    gathered, summed = (2 * 2 + 4) * 7 / 8, 2 * 4 / 8 * 7 / 8  # bytes per parameter
    moving = large.parameters * (gathered / 360e9 + summed / 40e9)
    found = pass_seconds(apart, large, 64, updates=True)  # a rollout on each GPU
    assert found == pytest.approx(moving)
    assert moving < pass_seconds(together, large, 64, updates=True)
    with pytest.raises(ConfigError, match="distributed.replicas = 3: expected a divisor of the 64"):
        apart.model_copy(update={"distributed": DistributedConfig(replicas=3)}).check_processes(64)


def test_what_makes_it_fit(paper):
    options = load_config(paper("--machine.gpus", "1"), PlanOptions)
    shapes = shapes_of(options)
    changes = fitting(options, shapes)
    arguments = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
    changed = load_config(paper(*arguments), PlanOptions)
    assert max(phase.bytes for phase in phases(changed, shapes)) <= 80 * GIB
    assert max(phase.bytes for phase in phases(options, shapes)) > 80 * GIB


def test_decoding_is_bound_by_the_longest_completion_or_by_all_of_them(paper):
    """14 sequences on a GPU: 3072 iterations, each a read of 2 P bytes and of the KV cache of those
    in it. 11200 take many times as long."""
    options = load_config(
        paper("--machine.gpus", "8", "--rollout.prompts_per_step", "8"), PlanOptions
    )
    small = shapes_of(options)["small"]
    read = (2 * small.parameters + 2 * 2 * 28 * 256 * 14 * 768 / 3072 * 534) / (0.7 * 3.35e12)
    prefill = 2 * small.parameters * 150 / (0.5 * 989e12)
    assert rollout_seconds(options, small) == pytest.approx(3072 * (read + 4e-3) + prefill)
    many = load_config(paper("--rollout.prompts_per_step", "6400"), PlanOptions)
    assert rollout_seconds(many, small) > 10 * rollout_seconds(options, small)


def test_command(paper, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    plan.main(paper("--machine.gpus", "1"))
    printed = capsys.readouterr().out
    for text in ("update large", "does not fit", "--rollout.sleep True"):
        assert text in " ".join(printed.split())
    plan.main(paper())
    assert "\nfits: " in capsys.readouterr().out


def test_mistakes(paper, tmp_path):
    with pytest.raises(ConfigError, match="machine.gpu = 'H1000'"):
        load_config(paper("--machine.gpu", "H1000"), PlanOptions)
    with pytest.raises(ConfigError, match="prompts_per_step = 64: expected a multiple of the 7"):
        plan.main(paper("--machine.gpus", "7"))
    (tmp_path / "small" / "config.json").write_text(json.dumps({"model_type": "none"}))
    with pytest.raises(ConfigError, match="small.path = "):
        plan.main(paper())
