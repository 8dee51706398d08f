"""Memory and time of a step on GPUs, by formulas. Runs nothing.

P parameters, W processes that share them, b bytes per number of the forward pass, H, I, V widths of
hidden states, MLP and head, T tokens of a micro-batch, prompts included, N completion tokens of it.
A test holds the memory of whole updates to within 15 % of what is allocated on a CPU; times have
seen no GPU.
"""

import math
from dataclasses import dataclass
from typing import Any, assert_never

import torch

from codistill.config.machinery import Checkpointing
from codistill.config.plan import MachineConfig, PlanOptions
from codistill.model.shape import ModelShape
from codistill_kernels._linear import slab_sizes

FP32, ADAM, GIB = 4, 8, 2**30  # bytes per number, bytes of Adam's two moments, bytes
# CUDA's context, NCCL's buffers, fragments; vLLM's activations and CUDA graphs. Assumed.
CONTEXT, ENGINE = 2 * GIB, 2 * GIB
# Shares of the highest rates that are reached. Assumed.
TRAINING_SHARE, SCORING_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.4, 0.5, 0.7, 0.8
ITERATION = 4e-3  # s that vLLM's host takes for an iteration of small batches; assumed
LATENCY = 1e-5  # s that a sum over GPUs takes at least; assumed
MOST_SEQUENCES = 256  # that vLLM decodes at once by default (max_num_seqs)


@dataclass(frozen=True)
class GPU:
    """Data sheets of NVIDIA, SXM."""

    memory_gib: float
    flops: float
    """Dense bf16 FLOP/s."""
    bandwidth: float
    """Rate of its memory (bytes/s)."""
    link: float
    """NVLink, one direction (bytes/s)."""


GPUS = {
    "A100": GPU(80, 312e12, 2.04e12, 300e9),
    "H100": GPU(80, 989e12, 3.35e12, 450e9),
    "H200": GPU(141, 989e12, 4.8e12, 450e9),
    "B200": GPU(180, 2250e12, 8e12, 900e9),
}


@dataclass(frozen=True)
class Phase:
    """What a phase of a step takes on each GPU."""

    name: str
    parts: dict[str, float]
    """Bytes, by what they hold."""
    seconds: float

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


# --- memory ------------------------------------------------------------------------------------


def activation_bytes(shape: ModelShape, b: int) -> float:
    """What a decoder layer keeps for its backward pass, per token.

    Counted tensor by tensor in transformers' Qwen2: a norm keeps its input in fp32, the same
    divided by its root mean square, and what it gives; attention q, k, v, what it gives, once more
    in one row, and the log-sum-exp of each head; the MLP gate, up, activation and product.
    """
    norms = (FP32 + 2 * b) * shape.norm_width + 2 * FP32
    attention = b * (3 * shape.query_width + 2 * shape.key_width) + FP32 * shape.heads
    return norms + attention + 4 * b * shape.intermediate


def kept_bytes(
    shape: ModelShape, tokens: float, b: int, *, checkpointing: Checkpointing = "none"
) -> float:
    """What all layers and the last norm keep of a micro-batch of T tokens.

    With gradient checkpointing the input of each layer, and all of the one that is computed again;
    where it is selective also what products and attention have given.
    """
    layer, hidden = activation_bytes(shape, b), shape.hidden
    products = 2 * shape.query_width + 2 * shape.key_width + 2 * hidden + 2 * shape.intermediate
    match checkpointing:
        case "none":
            layers = shape.layers * layer
        case "selective":
            kept = b * (products + hidden) + FP32 * shape.heads
            layers = shape.layers * kept + layer - b * products
        case "full":
            layers = shape.layers * b * hidden + layer
        case _:
            assert_never(checkpointing)
    return tokens * (layers + (FP32 + 2 * b) * hidden)


def head_bytes(shape: ModelShape, completion_tokens: float, b: int) -> float:
    """Hidden states of N tokens, their logits in the way that the kernels choose, dW."""
    rows, limit = math.ceil(completion_tokens), slab_sizes.WORKSPACE_MIB * 2**20
    dtype = torch.bfloat16 if b == 2 else torch.float32
    gradient = shape.vocab * shape.hidden * b
    match slab_sizes.plan(rows, shape.vocab, dtype, limit).way:
        case "kept":
            logits: float = b * rows * shape.vocab + slab_sizes.SLAB_BYTES
        case "chunks":  # the gradient is summed in fp32
            logits = limit + FP32 * shape.vocab * shape.hidden
        case "columns":
            logits = slab_sizes.SLAB_BYTES
    return 2 * b * rows * shape.hidden + logits + gradient


def update_bytes(
    shape: ModelShape,
    tokens: float,
    completion_tokens: float,
    b: int,
    *,
    processes: int,
    checkpointing: Checkpointing = "none",
) -> dict[str, float]:
    """What the last backward pass of a step takes beside weights and optimizer.

    FSDP2 gathers a layer while another one runs, and copies it out of the message; a layer's whole
    gradient is there in b bytes, and in fp32 in the messages of two layers. Embedding and head stay
    gathered, and their gradient is summed over micro-batches in fp32 before it is sharded.
    """
    layer, root = shape.layer_parameters, shape.root_parameters
    is_alone = processes == 1
    messages = 0 if is_alone else (b + 2 * FP32) * layer
    sharded = FP32 * shape.layers * layer / processes
    return {
        "gathered": b * (root + (2 if is_alone else 3) * layer),
        "gradients": sharded + messages + FP32 * root,
        "activations": kept_bytes(shape, tokens, b, checkpointing=checkpointing),
        "head": head_bytes(shape, completion_tokens, b),
    }


def phase_bytes(options: PlanOptions, shapes: dict[str, ModelShape], name: str) -> dict[str, float]:
    """What each GPU holds in a phase: rollout, score, sync, or the name of the model it updates.

    With engine server there is none here. vLLM asleep (rollout.sleep) keeps its CUDA graphs on the
    GPU, weights on the host and no KV cache.
    """
    training, processes = options.training, options.gpus_per_replica
    b = FP32 if training.dtype == "float32" else 2
    tokens = float(training.tokens_per_micro_batch)
    completion_tokens = tokens * options.mean_completion / sequence_tokens(options)
    writer = shapes[options.writer]
    trained = sum(shapes[model].parameters for model in options.trained)
    is_here, states_are_here = training.offload != "all", training.offload == "none"
    is_inside = options.rollout.engine != "server"
    is_awake = not options.rollout.sleep or name in ("rollout", "sync")
    sharers, cache = options.rollout.tensor_parallel, options.rollout.kv_cache_gib * GIB
    parts = {
        "weights": is_here * sum(FP32 * s.parameters for s in shapes.values()) / processes,
        "optimizer": states_are_here * ADAM * trained / processes,
        "engine": is_inside * (ENGINE + is_awake * (b * writer.parameters / sharers + cache)),
        "context": float(CONTEXT),
    }
    match name:
        case "rollout":
            return parts
        case "sync":
            return parts | {"gathered": float(FP32 * writer.largest_parameter)}
        case "score":
            gathered = sum(
                b * (s.root_parameters + 2 * s.layer_parameters) for s in shapes.values()
            )
            layer = max(activation_bytes(s, b) for s in shapes.values()) * tokens
            head = b * completion_tokens * max(s.hidden for s in shapes.values())
            return parts | {
                "gathered": float(gathered),
                "activations": layer,
                "head": head + slab_sizes.SLAB_BYTES,
            }
    shape = shapes[name]
    update = update_bytes(
        shape,
        tokens,
        completion_tokens,
        b,
        processes=processes,
        checkpointing=training.gradient_checkpointing,
    )
    sharded = FP32 * shape.parameters / processes
    if not is_here:
        update["gradients"] -= FP32 * shape.layers * shape.layer_parameters / processes
    # Scoring leaves embedding and head of each model that learns gathered until its update.
    waiting = options.trained[options.trained.index(name) + 1 :]
    update["gathered"] += sum(b * shapes[other].root_parameters for other in waiting)
    states = ADAM * shape.parameters / processes
    if training.offload == "optimizer" and sum(update.values()) < states + sharded:
        return parts | {"optimizer": states, "gradients": sharded}  # the optimizer's step
    return parts | update


def capacity(options: PlanOptions) -> float:
    """Bytes of each GPU."""
    return GIB * (options.machine.memory_gib or GPUS[options.machine.gpu].memory_gib)


def most_bytes(options: PlanOptions, shapes: dict[str, ModelShape]) -> float:
    """Bytes of the phase that takes most."""
    return max(phase.bytes for phase in phases(options, shapes))


def fitting(options: PlanOptions, shapes: dict[str, ModelShape]) -> dict[str, Any]:
    """Keys and values that make the run fit, the cheapest first; nothing if none of these do."""
    rollout, gpus = options.rollout, options.machine.gpus
    longest = rollout.max_prompt_tokens + rollout.max_completion_tokens
    tries = [
        ("training.gradient_checkpointing", "selective"),
        ("training.gradient_checkpointing", "full"),
        ("training.tokens_per_micro_batch", longest),
        ("rollout.sleep", True),
        ("training.offload", "optimizer"),
        ("training.offload", "all"),
        *(("machine.gpus", gpus * 2**power) for power in range(1, 8)),
    ]
    changes: dict[str, Any] = {}
    needed = most_bytes(options, shapes)
    for key, value in tries:
        section, _, name = key.partition(".")
        changed = getattr(options, section).model_copy(update={name: value})
        tried = options.model_copy(update={section: changed})
        if most_bytes(tried, shapes) >= needed:
            continue
        options, needed, changes = tried, most_bytes(tried, shapes), changes | {key: value}
        if needed <= capacity(options):
            return changes
    return {}


# --- time --------------------------------------------------------------------------------------


def sequence_tokens(options: PlanOptions) -> float:
    """Tokens of a prompt and its completion, on average."""
    return options.machine.mean_prompt_tokens + options.mean_completion


def rollout_seconds(options: PlanOptions, shape: ModelShape) -> float:
    """Decoding by each engine: iterations, each of which reads all weights and the KV cache of the
    sequences in it, or computes 2 P per sequence, whichever takes longer.

    There are as many iterations as the longest completion has tokens, or more where not all
    sequences are decoded at once. The GPUs of an engine, its sharers, do equal parts of all that,
    except that each has at least one key head, and add up hidden states twice per layer.
    """
    gpu, rollout = GPUS[options.machine.gpu], options.rollout
    prompt, completion = options.machine.mean_prompt_tokens, options.mean_completion
    sharers = rollout.tensor_parallel
    engines = len(rollout.servers) or options.machine.gpus / sharers
    weights = shape.multiplied / sharers
    sequences = rollout.prompts_per_step * rollout.num_generations / engines
    key_width = max(shape.key_width / sharers, shape.query_width / shape.heads)
    kv_bytes = 2 * 2 * shape.layers * key_width  # K and V in bf16, per token
    room = rollout.kv_cache_gib * GIB / (kv_bytes * (prompt + completion))
    at_once = max(1.0, min(sequences, MOST_SEQUENCES, room))
    iterations = max(rollout.max_completion_tokens, sequences * completion / at_once)
    together = sequences * completion / iterations
    read = 2 * weights + kv_bytes * together * (prompt + completion / 2)
    compute = 2 * weights * together / (SCORING_SHARE * gpu.flops)
    decode = max(read / (BANDWIDTH_SHARE * gpu.bandwidth), compute) + ITERATION
    decode += sum_seconds(options.machine, shape, together, sharers)
    prompts = rollout.prompts_per_step / engines * prompt
    prefill = 2 * weights * prompts / (SCORING_SHARE * gpu.flops)
    prefill += sum_seconds(options.machine, shape, prompts, sharers)
    return iterations * decode + prefill


def sum_seconds(machine: MachineConfig, shape: ModelShape, tokens: float, sharers: int) -> float:
    """Sums of the hidden states of so many tokens over the GPUs of an engine, in bf16: two per
    layer, in each of which a GPU sends, and gets, its share twice, less what is its own."""
    if sharers == 1:
        return 0.0
    moved = 2 * 2 * shape.hidden * tokens * (sharers - 1) / sharers
    return 2 * shape.layers * (moved / link_rate(machine, sharers) + LATENCY)


def flops_per_token(shape: ModelShape, sequence: float) -> float:
    """Operations of a forward pass: 2 for each weight that multiplies; scores and values of
    attention, each 2 for each number of a query and each token of half the sequence."""
    return 2 * shape.multiplied + 2 * 2 * shape.layers * shape.query_width * sequence / 2


def link_rate(machine: MachineConfig, gpus: int) -> float:
    """Bytes/s at which a GPU gathers from so many, or sums with them."""
    is_one_node = gpus <= machine.gpus_per_node
    return LINK_SHARE * (GPUS[machine.gpu].link if is_one_node else machine.network * 1e9)


def pass_seconds(
    options: PlanOptions, shape: ModelShape, rollouts: float, *, updates: bool
) -> float:
    """Forward passes over so many rollouts of all GPUs, or forward and backward passes: products
    and attention, or gathering the weights in each micro-batch, whichever takes longer.

    Replicas sum gradients after each micro-batch: each GPU sends, and gets, its share of them
    twice, less what is its own.
    """
    machine, training = options.machine, options.training
    b = FP32 if training.dtype == "float32" else 2
    sequence = sequence_tokens(options)
    tokens = rollouts * sequence / machine.gpus
    passes = 1.0
    if updates:
        passes = 4.0 if training.gradient_checkpointing == "full" else 3.0
    share = TRAINING_SHARE if updates else SCORING_SHARE
    compute = passes * flops_per_token(shape, sequence) * tokens / (share * GPUS[machine.gpu].flops)
    micro_batches = math.ceil(tokens / training.tokens_per_micro_batch)
    gathered = b * shape.parameters * (2 if updates else 1)
    if updates:
        gathered += FP32 * shape.parameters
    replicas, sharers = options.distributed.replicas, options.gpus_per_replica
    moving = gathered * (sharers - 1) / sharers / link_rate(machine, sharers)
    if updates and replicas > 1:
        summed = 2 * FP32 * shape.parameters / sharers * (replicas - 1) / replicas
        moving += summed / link_rate(machine, machine.gpus)
    return max(compute, micro_batches * moving)


def phases(options: PlanOptions, shapes: dict[str, ModelShape]) -> list[Phase]:
    """The phases of a step in their order; shapes: of the models that the algorithm loads."""
    prompts, written = options.rollout.prompts_per_step, options.rollout.num_generations
    trained = prompts * options.kept * options.training.inner_epochs
    rate = link_rate(options.machine, options.gpus_per_replica)
    sync = FP32 * shapes[options.writer].parameters / rate
    seconds = {
        "rollout": rollout_seconds(options, shapes[options.writer]),
        "score": sum(
            pass_seconds(options, shape, prompts * written, updates=False)
            for shape in shapes.values()
        ),
        **{n: pass_seconds(options, shapes[n], trained, updates=True) for n in options.trained},
        "sync": sync,
    }
    labels = {name: f"update {name}" for name in options.trained}
    return [
        Phase(labels.get(name, name), phase_bytes(options, shapes, name), value)
        for name, value in seconds.items()
    ]
