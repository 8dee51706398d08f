"""`python -m codistill plan`: its formulas by hand, what it prints and what it proposes."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
from test_planned_memory import shape_of

from codistill.commands import plan
from codistill.config import ConfigError, load_config
from codistill.config.machinery import DistributedConfig
from codistill.config.plan import PlanOptions
from codistill.model.shape import ModelShape, model_shape
from codistill.planning import fitting, lacking_bytes, phases, ways_to_fit, with_changes
from codistill.planning.machines import GIB
from codistill.planning.memory import host_bytes, pinned_bytes
from codistill.planning.times import pass_seconds, rollout_seconds, update_seconds

ROOT = Path(__file__).parents[2]


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
    models = {name: options.model(name) for name in options.loaded}
    return {n: model_shape(f"{n}.path", model.path, model.lora) for n, model in models.items()}


def test_shapes_of_the_papers_models(paper):
    small, large = shapes_of(load_config(paper(), PlanOptions)).values()
    assert small.parameters == 1_543_714_304  # as in their model cards: 1.54 and 7.61 billion
    assert large.parameters == 7_615_616_512
    assert small.multiplied() == small.parameters and small.is_tied
    assert large.multiplied() == large.parameters - 152064 * 3584
    assert large.key_width == 4 * 128 and large.norm_width == 2 * 3584
    assert large.layer_parameters * 28 + large.root_parameters == large.parameters


def test_weights_and_optimizer_by_hand(paper):
    options = load_config(paper("--machine.gpus", "8"), PlanOptions)
    parameters = 1_543_714_304 + 7_615_616_512
    for phase in phases(options, shapes_of(options)):
        assert phase.parts["weights"] == 4 * parameters / 8
        assert phase.parts["optimizer"] == 8 * parameters / 8
        if phase.name != "evaluate":
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
    sleeps = paper("--rollout.sleep", "true", "--evaluation.large", "never")
    options = load_config(sleeps, PlanOptions)
    engine = {phase.name: phase.parts["engine"] for phase in phases(options, shapes_of(options))}
    awake = 2 * 1_543_714_304 + (16 + 2) * GIB
    assert engine == {
        "rollout": awake,
        "score": 2 * GIB,
        "update small": 2 * GIB,
        "update large": 2 * GIB,
        "sync": awake,
    }


SMALL, LARGE = 1_543_714_304, 7_615_616_512


@pytest.mark.parametrize(
    ("arguments", "engine", "contexts"),
    [
        ((), 2 * SMALL + 2 * LARGE + 2 * (16 + 2) * GIB, 2),
        (("--rollout.sleep", "true"), 2 * LARGE + (16 + 2 + 2) * GIB, 2),
        (("--rollout.tensor_parallel", "2"), SMALL + LARGE + 2 * (16 + 2) * GIB, 2),
        (("--rollout.engine", "hf"), 2 * SMALL + 2 * LARGE + 2 * (16 + 2) * GIB, 1),
        (
            ("--rollout.engine", "server", "--rollout.servers", "http://a:1"),
            2 * LARGE + (16 + 2) * GIB,
            2,
        ),
    ],
    ids=["vllm", "sleep", "shared", "hf", "server"],
)
def test_evaluation_of_the_large_model_by_hand(paper, arguments, engine, contexts):
    """A server is a process of its own; the embedding is gathered, and rounded for the server."""
    options = load_config(paper(*arguments), PlanOptions)
    phase = phases(options, shapes_of(options))[-1]
    assert (phase.name, phase.seconds) == ("evaluate", 0)
    assert phase.parts == {
        "weights": 4 * (SMALL + LARGE) / 8,
        "optimizer": 8 * (SMALL + LARGE) / 8,
        "engine": engine,
        "context": contexts * 2 * GIB,
        "gathered": (4 + 2 * (contexts - 1)) * 152064 * 3584,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("--evaluation.large", "never"),
        ("--algorithm", "kdrl"),
        ("--algorithm", "grpo", "--grpo.model", "large"),
    ],
    ids=str,
)
def test_a_large_model_that_no_second_engine_evaluates(paper, arguments):
    options = load_config(paper(*arguments), PlanOptions)
    assert phases(options, shapes_of(options))[-1].name == "sync"


def test_a_shared_engine_by_hand(paper):
    """Two GPUs per engine: half of the weights on each, twice the sequences in each iteration."""
    paper = partial(paper, "--evaluation.large", "never")
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
    saved = 2 * writer.multiplied() / 2 / (0.7 * 3.35e12)
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


def test_what_is_on_the_host_by_hand(paper):
    """Shards of 8 processes, in blocks of a power of two: the head of the 7B is 273 MB, in 512 MiB.
    AdamW makes its moments on the CPU unpinned."""
    assert pinned_bytes([152064 * 3584], 8) == 512 * 2**20
    offloads = {}
    for offload in ("none", "optimizer", "all"):
        options = load_config(paper("--training.offload", offload), PlanOptions)
        offloads[offload] = host_bytes(options, shapes_of(options))
    shapes = shapes_of(options)
    pinned = {name: pinned_bytes(shape.weights, 8) for name, shape in shapes.items()}
    parameters = sum(shape.parameters for shape in shapes.values())
    assert 4 * parameters / 8 < sum(pinned.values()) < 2 * 4 * parameters / 8
    assert offloads["none"] == {}
    assert offloads["optimizer"] == {"training.offload": 2 * sum(pinned.values())}
    weights_and_gradients = sum(pinned.values()) + pinned["large"]
    assert offloads["all"] == {"training.offload": weights_and_gradients + parameters}
    options = load_config(
        paper("--rollout.sleep", "true", "--checkpoint.asynchronous", "true"), PlanOptions
    )
    assert host_bytes(options, shapes) == {
        "rollout.sleep": 2 * 1_543_714_304,
        "checkpoint.asynchronous": 12 * parameters / 8,
    }


def test_time_of_copies_by_hand(paper):
    """PCIe at 0.8 * 64 GB/s for each GPU; the node's memory at 400 GB/s for all of them."""
    plain = load_config(paper("--training.gradient_checkpointing", "none"), PlanOptions)
    shapes = shapes_of(plain)
    large = shapes["large"]
    found = {}
    for offload in ("optimizer", "all"):
        changed = plain.training.model_copy(update={"offload": offload, "inner_epochs": 2})
        options = plain.model_copy(update={"training": changed})
        steps = update_seconds(options, large) - pass_seconds(options, large, 1024, updates=True)
        found[offload] = steps
    share = large.parameters / 8
    assert found["optimizer"] == pytest.approx(2 * 2 * 8 * share / 51.2e9)
    assert found["all"] == pytest.approx(2 * 84 * share * 8 / 400e9)
    # One rollout on each GPU: its 918 tokens take less than the copies of all weights.
    gathered = (2 * 2 + 4) * 7 / 8 * large.parameters / 360e9
    copied = 2 * 4 * share / 51.2e9
    assert pass_seconds(options, large, 8, updates=True) == pytest.approx(gathered + copied)
    asleep = load_config(paper("--rollout.sleep", "true"), PlanOptions)
    for one, other in zip(phases(asleep, shapes), phases(plain, shapes), strict=True):
        copy = 2 * shapes["small"].parameters / 51.2e9 if one.name in ("rollout", "sync") else 0
        assert one.name.startswith("update") or one.seconds == pytest.approx(other.seconds + copy)


def test_references_take_weights_and_a_pass_over_what_is_kept(paper):
    """Two models of 8 kept rollouts each, beside the 14 that both score; with adapters no copy."""
    plain, beta = (load_config(paper("--loss.beta", value), PlanOptions) for value in ("0", "0.1"))
    shapes = shapes_of(plain)
    without, with_references = (
        {phase.name: phase for phase in phases(options, shapes)} for options in (plain, beta)
    )
    weights = without["rollout"].parts["weights"]
    assert with_references["rollout"].parts["weights"] == 2 * weights
    expected = without["score"].seconds * (14 + 8) / 14
    assert with_references["score"].seconds == pytest.approx(expected)
    lora = ("--loss.beta", "0.1", "--large.lora.rank", "8", "--large.lora.alpha", "16")
    assert load_config(paper(*lora), PlanOptions).references == ("small",)


def test_adapters_are_what_learns(paper):
    """Rank 32 on all linear layers of the 7B; one pass less, and no gradient of the head."""
    lora = ("--large.lora.rank", "32", "--large.lora.alpha", "64")
    options, plain = load_config(paper(*lora), PlanOptions), load_config(paper(), PlanOptions)
    shapes, whole = shapes_of(options), shapes_of(plain)
    numbers = 28 * 32 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert shapes["large"].trained == numbers
    update = {phase.name: phase for phase in phases(options, shapes)}["update large"]
    before = {phase.name: phase for phase in phases(plain, whole)}["update large"]
    small = 1_543_714_304
    assert update.parts["optimizer"] == 8 * (small + numbers) / 8
    assert update.parts["weights"] == 4 * (small + 7_615_616_512 + numbers) / 8
    assert update.parts["gradients"] == pytest.approx(4 * numbers / 8 + 10 * numbers / 28)
    in_chunks = 2 + 4  # bytes: the gradient, and its sum in fp32
    assert before.parts["head"] - update.parts["head"] == in_chunks * 152064 * 3584
    passes = [pass_seconds(options, s["large"], 8000, updates=True) for s in (shapes, whole)]
    assert passes[0] / passes[1] == pytest.approx(3 / 4)  # with full checkpointing


def test_what_makes_it_fit(paper):
    options = load_config(paper("--machine.gpus", "1"), PlanOptions)
    shapes = shapes_of(options)
    changes = fitting(options, shapes)
    arguments = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
    changed = load_config(paper(*arguments), PlanOptions)
    assert max(phase.bytes for phase in phases(changed, shapes)) <= 80 * GIB
    assert max(phase.bytes for phase in phases(options, shapes)) > 80 * GIB
    # With all on the host neither the engine need sleep nor micro-batches be small.
    assert changes == {"training.offload": "all"}


def with_memory(paper, gib: int, *arguments: str) -> PlanOptions:
    """An engine that sleeps, and a KV cache of 38 GiB: the evaluation of the large model takes most
    of all phases."""
    sizes = ("--machine.memory_gib", str(gib), "--rollout.sleep", "true")
    return load_config(paper(*sizes, "--rollout.kv_cache_gib", "38", *arguments), PlanOptions)


def test_an_engine_that_does_not_fit_is_shared_by_as_few_as_suffice(paper):
    """28 heads of the 7B and 12 of the 1.5B: 2 and 4 of the 8 processes of a node, and not 8."""
    options = with_memory(paper, 70)
    shapes = shapes_of(options)
    lacking = [phase.name for phase in phases(options, shapes) if phase.bytes > 70 * GIB]
    assert lacking == ["evaluate"]
    assert fitting(options, shapes) == {"rollout.tensor_parallel": 2}
    ways = [value for key, value in ways_to_fit(options) if key == "rollout.tensor_parallel"]
    assert ways == [2, 4, 8]
    assert lacking_bytes(with_changes(options, {"rollout.tensor_parallel": 4}), shapes) == 0
    assert lacking_bytes(with_changes(options, {"rollout.tensor_parallel": 8}), shapes) == math.inf
    # The engine hf is not shared.
    options = with_memory(paper, 70, "--rollout.engine", "hf")
    assert fitting(options, shapes) == {"training.offload": "optimizer"}


def test_an_evaluation_that_does_not_fit_is_left_out_before_there_are_more_gpus(paper):
    options = with_memory(paper, 50, "--rollout.engine", "hf", "--training.offload", "all")
    assert fitting(options, shapes_of(options)) == {"evaluation.large": "never"}


def test_a_dearer_change_lets_others_take_a_cheaper_value(paper):
    """Two processes per engine suffice once the optimizer's states are on the host."""
    options = with_memory(paper, 62)
    shapes = shapes_of(options)
    assert lacking_bytes(with_changes(options, {"rollout.tensor_parallel": 4}), shapes) > 0
    expected = {"rollout.tensor_parallel": 2, "training.offload": "optimizer"}
    assert fitting(options, shapes) == expected


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
    for text in ("does not fit (rollout, score, ", "fits with: --training.offload all"):
        assert text in " ".join(printed.split())
    plan.main(paper("--rollout.sleep", "true"))
    printed = " ".join(capsys.readouterr().out.split())
    assert " fits: " in printed
    assert "host's memory: 23 GiB on each node, 2.9 per process (rollout.sleep)" in printed
    assert "by a vLLM server on the first GPU of each node" in printed
    plan.main(paper("--machine.memory_gib", "70"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "does not fit (evaluate): 72.9 of 70 GiB" in printed
    assert "--evaluation.large never leaves it out. fits with: --rollout.sleep True" in printed
    plan.main(paper("--evaluation.large", "never", "--machine.memory_gib", "70"))
    assert "evaluate" not in capsys.readouterr().out


def test_the_recipe_shows_what_is_printed(paper, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    plan.main(paper("--machine.gpus", "8"))
    page = (ROOT / "docs" / "training_8_gpus.md").read_text().splitlines()
    missing = [line for line in capsys.readouterr().out.splitlines() if line.rstrip() not in page]
    assert not missing


def test_mistakes(paper, tmp_path):
    with pytest.raises(ConfigError, match="machine.gpu = 'H1000'"):
        load_config(paper("--machine.gpu", "H1000"), PlanOptions)
    with pytest.raises(ConfigError, match="prompts_per_step = 64: expected a multiple of the 7"):
        plan.main(paper("--machine.gpus", "7"))
    (tmp_path / "small" / "config.json").write_text(json.dumps({"model_type": "none"}))
    with pytest.raises(ConfigError, match="small.path = "):
        plan.main(paper())
