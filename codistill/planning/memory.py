"""Memory of a step, on each GPU and on the host, by formulas.

P parameters, W processes that share them, b bytes per number of the forward pass, H, I, V widths of
hidden states, MLP and head, T tokens of a micro-batch, prompts included, N completion tokens of it.
A test holds whole updates to within 15 % of what is allocated on a CPU.
"""

import math
from collections.abc import Iterable
from typing import assert_never

import torch

from codistill.config.machinery import Checkpointing
from codistill.config.plan import PlanOptions
from codistill.model.shape import ModelShape
from codistill.planning.machines import ADAM, FP32, GIB, GPUS
from codistill_kernels._linear import slab_sizes

# CUDA's context, NCCL's buffers, fragments; vLLM's activations and CUDA graphs. Assumed.
CONTEXT, ENGINE = 2 * GIB, 2 * GIB
CHECKPOINT = FP32 + ADAM  # bytes of a checkpoint per number that learns


def activation_bytes(shape: ModelShape, b: int) -> float:
    """What a decoder layer keeps for its backward pass, per token.

    Counted tensor by tensor in transformers' Qwen2: attention keeps q, k, v, what it gives and the
    log-sum-exp of each head; the MLP gate, up and activation. A linear layer y = x W^T has the
    gradients dx = dy W and dW = dy^T x, so it keeps x only if W learns. One with an adapter,
    y = x W^T + s (x A^T) B^T, keeps x for dA and x A^T for dB. All linear layers of a decoder
    layer read four different x: what its two norms give, attention's output in one row, and the
    product of activation and up. The first decoder layer counts as any other, although nothing
    before its first adapter has a gradient.
    """
    norms = norm_bytes(shape, b) * shape.norm_width + 2 * FP32
    attention = b * (2 * shape.query_width + 2 * shape.key_width) + FP32 * shape.heads
    linear = b * (shape.learning_inputs + shape.adapter_width)
    return norms + attention + b * 3 * shape.intermediate + linear


def norm_bytes(shape: ModelShape, b: int) -> int:
    """What a norm keeps per number: its input in fp32 and, if its weight learns, the same divided
    by its root mean square. What it gives is kept by what reads it."""
    return FP32 + (0 if shape.adapters else b)


def kept_bytes(
    shape: ModelShape, tokens: float, b: int, *, checkpointing: Checkpointing = "none"
) -> float:
    """What all layers and the last norm keep of a micro-batch of T tokens.

    With gradient checkpointing the input of each layer, and all of the one that is computed again;
    where it is selective the others also keep what products and attention have given. Frozen layers
    make products, too, and each adapter two more: A's, and B's, which is as wide as its layer's.
    """
    layer, hidden, attention = activation_bytes(shape, b), shape.hidden, shape.query_width
    linear = shape.query_width + 2 * shape.key_width + 2 * hidden + 2 * shape.intermediate
    products = linear + attention + shape.adapter_width + shape.adapter_outputs
    match checkpointing:
        case "none":
            layers = shape.layers * layer
        case "selective":
            others = b * products + FP32 * shape.heads
            layers = shape.layers * b * hidden + (shape.layers - 1) * others + layer
        case "full":
            layers = shape.layers * b * hidden + layer
        case _:
            assert_never(checkpointing)
    return tokens * (layers + norm_bytes(shape, b) * hidden)


def head_bytes(shape: ModelShape, completion_tokens: float, b: int) -> float:
    """Hidden states of N tokens, their logits in the way that the kernels choose, and dW, unless
    adapters learn: then the head is frozen."""
    rows, limit = math.ceil(completion_tokens), slab_sizes.WORKSPACE_MIB * 2**20
    dtype = torch.bfloat16 if b == 2 else torch.float32
    numbers = 0 if shape.adapters else shape.vocab * shape.hidden
    match slab_sizes.plan(rows, shape.vocab, dtype, limit).way:
        case "kept":
            logits: float = b * rows * shape.vocab + slab_sizes.SLAB_BYTES
        case "chunks":  # the gradient is summed in fp32
            logits = limit + FP32 * numbers
        case "columns":
            logits = slab_sizes.SLAB_BYTES
    return 2 * b * rows * shape.hidden + logits + b * numbers


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
    layer, learning = shape.layer_parameters, shape.layer_trained
    is_alone = processes == 1
    messages = 0 if is_alone else (b + 2 * FP32) * learning
    sharded = FP32 * shape.layers * learning / processes
    return {
        "gathered": b * (shape.root_parameters + (2 if is_alone else 3) * layer),
        "gradients": sharded + messages + FP32 * shape.root_trained,
        "activations": kept_bytes(shape, tokens, b, checkpointing=checkpointing),
        "head": head_bytes(shape, completion_tokens, b),
    }


def held_shapes(options: PlanOptions, shapes: dict[str, ModelShape]) -> list[ModelShape]:
    """The shape of each model that is in memory: those that are loaded, and the references."""
    return [*shapes.values(), *(shapes[name] for name in options.references)]


def engine_bytes(options: PlanOptions, shape: ModelShape, sharers: int) -> float:
    """An engine on each of the GPUs that share it: weights, KV cache, and what else it takes."""
    weights = options.forward_bytes * shape.parameters / sharers
    return ENGINE + weights + options.rollout.kv_cache_gib * GIB


def phase_bytes(options: PlanOptions, shapes: dict[str, ModelShape], name: str) -> dict[str, float]:
    """What each GPU holds in a phase: rollout, score, sync, evaluate (of the large model), or the
    name of the model it updates.

    With engine server there is none here. vLLM asleep (rollout.sleep) keeps its CUDA graphs on the
    GPU, weights on the host and no KV cache.
    """
    training, processes = options.training, options.gpus_per_replica
    writer = shapes[options.writer]
    trained = sum(shapes[model].trained for model in options.trained)
    held = sum(shape.held for shape in held_shapes(options, shapes))
    is_inside = options.rollout.engine != "server"
    is_awake = not options.rollout.sleep or name in ("rollout", "sync")
    awake = engine_bytes(options, writer, options.rollout.tensor_parallel)
    parts = {
        "weights": (training.offload != "all") * FP32 * held / processes,
        "optimizer": (training.offload == "none") * ADAM * trained / processes,
        "engine": is_inside * (awake if is_awake else float(ENGINE)),
        "context": float(CONTEXT),
    }
    match name:
        case "rollout":
            return parts
        case "sync":
            return parts | {"gathered": float(FP32 * max(writer.weights))}
        case "score":
            return parts | score_bytes(options, shapes)
        case "evaluate":
            return parts | evaluation_bytes(options, shapes["large"], parts)
        case _:
            return parts | learning_bytes(options, shapes, name)


def evaluation_bytes(
    options: PlanOptions, large: ModelShape, parts: dict[str, float]
) -> dict[str, float]:
    """The large model's engine added to `parts`, and what a sync of it gathers.

    Where vLLM writes the rollouts it is a server, a process of its own with its own context, on the
    first GPU of each node, or the first `rollout.tensor_parallel` ones (`engine.own_server`); a
    weight is there once more as it travels. The engine hf is in each process and takes it as it is.
    """
    machine, is_server = options.machine, options.rollout.engine != "hf"
    sharers = min(options.rollout.tensor_parallel, machine.gpus, machine.gpus_per_node)
    travelling = FP32 + is_server * options.forward_bytes
    return {
        "engine": parts["engine"] + engine_bytes(options, large, sharers),
        "context": parts["context"] + is_server * CONTEXT,
        "gathered": float(travelling * max(large.weights)),
    }


def completion_tokens(options: PlanOptions) -> float:
    """Completion tokens of a micro-batch, on average."""
    share = options.mean_completion / options.mean_sequence
    return options.training.tokens_per_micro_batch * share


def score_bytes(options: PlanOptions, shapes: dict[str, ModelShape]) -> dict[str, float]:
    """What the last forward pass of scoring takes. Embedding and head of all models stay
    gathered."""
    b, models = options.forward_bytes, held_shapes(options, shapes)
    layer = max(activation_bytes(shape, b) for shape in models)
    hidden_states = b * completion_tokens(options) * max(shape.hidden for shape in models)
    return {
        "gathered": float(sum(b * (s.root_parameters + 2 * s.layer_parameters) for s in models)),
        "activations": layer * options.training.tokens_per_micro_batch,
        "head": hidden_states + slab_sizes.SLAB_BYTES,
    }


def learning_bytes(
    options: PlanOptions, shapes: dict[str, ModelShape], name: str
) -> dict[str, float]:
    """What the update of a model takes beside weights and engine: its last backward pass or, where
    its optimizer's states come from the host for it, the optimizer's step."""
    training, b, processes = options.training, options.forward_bytes, options.gpus_per_replica
    shape = shapes[name]
    update = update_bytes(
        shape,
        training.tokens_per_micro_batch,
        completion_tokens(options),
        b,
        processes=processes,
        checkpointing=training.gradient_checkpointing,
    )
    if training.offload == "all":
        update["gradients"] -= FP32 * shape.layers * shape.layer_trained / processes
    # Scoring leaves embedding and head of each model that learns gathered until its update.
    waiting = options.trained[options.trained.index(name) + 1 :]
    update["gathered"] += sum(b * shapes[other].root_parameters for other in waiting)
    sharded, states = FP32 * shape.trained / processes, ADAM * shape.trained / processes
    if training.offload == "optimizer" and sum(update.values()) < states + sharded:
        return {"optimizer": states, "gradients": sharded}
    return update


def capacity(options: PlanOptions) -> float:
    """Bytes of each GPU."""
    return GIB * (options.machine.memory_gib or GPUS[options.machine.gpu].memory_gib)


# --- memory of the host ------------------------------------------------------------------------


def pinned_bytes(sizes: Iterable[int], processes: int) -> float:
    """Shards of fp32 numbers in pinned memory, of which torch takes a power of two for each."""
    return sum(2.0 ** math.ceil(math.log2(FP32 * size / processes)) for size in sizes)


def host_bytes(options: PlanOptions, shapes: dict[str, ModelShape]) -> dict[str, float]:
    """What each process keeps in the host's memory, by the key that wants it there.

    training.offload: Adam's two moments; with all, weights and the gradients of one model, too.
    """
    training, processes = options.training, options.gpus_per_replica
    learning = [shapes[name] for name in options.trained]
    trained = [size for shape in learning for size in shape.adapters or shape.weights]
    parts: dict[str, float] = {}
    match training.offload:
        case "none":
            pass
        case "optimizer":
            parts["training.offload"] = 2 * pinned_bytes(trained, processes)
        case "all":  # AdamW makes its moments on the CPU, unpinned
            held = [size for s in held_shapes(options, shapes) for size in s.weights + s.adapters]
            gradients = [pinned_bytes(s.adapters or s.weights, processes) for s in learning]
            moments = ADAM * sum(trained) / processes
            parts["training.offload"] = pinned_bytes(held, processes) + max(gradients) + moments
        case _:
            assert_never(training.offload)
    if options.rollout.sleep:
        weights = options.forward_bytes * shapes[options.writer].parameters
        parts["rollout.sleep"] = weights / options.rollout.tensor_parallel
    if options.checkpoint.asynchronous:
        parts["checkpoint.asynchronous"] = CHECKPOINT * sum(trained) / processes
    return parts
