"""Predictions for the GPU paths, and measurements beside them."""

import collections
import dataclasses

import pytest
import torch

import codistill_kernels as kernels
from bench import operations, results
from bench.devices import EXPOSED, H100, H200, LAUNCH, Device, Run, device_named
from bench.path_parts import DTYPE, Case
from bench.paths import OPERATIONS
from bench.report import cell
from bench.roofline import GOALS, LLAMA, QWEN, Goal, Line, main, predict, roofline_ms, title
from bench.shapes import Shape
from bench.table import Table, column_names
from codistill_kernels import _backends
from codistill_kernels._linear import (
    exponentials_triton,
    slab_sizes,
    slabs,
    softmax_triton,
    triton_backend,
)
from codistill_kernels._pair import chunks as pair_chunks
from codistill_kernels._pair import divergences_triton, reverse_kl_triton

SMALL = Device("small", matmul=1e12, copy=1e9, multiprocessors=2)


@pytest.mark.parametrize("case", GOALS, ids=title)
def test_goals_on_an_h200(case):
    assert predict(H200, case).misses(GOALS[case]) == []


def test_a_missed_goal_is_said():
    case = Case("linear_logps", "both", *QWEN)
    slow = predict(H100, case)
    assert slow.misses(Goal(ms=slow.ms - 1, gib=1.0, share=0.99)) == [
        f"{slow.ms - 1:g} ms",
        "1 GiB",
        "99% of cuBLAS",
    ]


class Recorder(Run):
    def __init__(self):
        super().__init__(H200)
        self.products = []

    def product(self, part, m, n, k, out_bytes, add=False):
        self.products.append((m, n, k, out_bytes, add))


@pytest.fixture
def products_of_code(monkeypatch):
    """Products (rows, columns, inner size, bytes of a result, added to) that the code makes with
    small inputs, in order. It runs on the CPU; kernels and products only note their sizes."""
    made = []

    def product(a, b, out, *, add=False):
        rows, inner = a.shape
        made.append((rows, b.shape[1], inner, out.element_size(), add))

    def nothing(*_, **__):
        pass

    launcher = collections.defaultdict(lambda: nothing)
    monkeypatch.setattr(_backends, "choose", lambda *_: "triton")
    for module in (exponentials_triton, triton_backend, slabs, pair_chunks):
        monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(slabs, "segment_states", nothing)
    monkeypatch.setattr(triton_backend, "logit_gradients", nothing)
    monkeypatch.setattr(exponentials_triton, "finish_exponentials_kernel", launcher)
    monkeypatch.setattr(softmax_triton, "merge_states_kernel", launcher)
    monkeypatch.setattr(reverse_kl_triton, "pair_states_kernel", launcher)
    monkeypatch.setattr(divergences_triton, "pair_sums_kernel", launcher)
    monkeypatch.setattr(divergences_triton, "pair_gradients_kernel", launcher)
    monkeypatch.setattr(pair_chunks, "COLUMNS", 128)
    monkeypatch.setattr(slab_sizes, "SEGMENT", 64)
    monkeypatch.setattr(slab_sizes, "ROWS", 2048)
    monkeypatch.setattr(slab_sizes, "SLAB_BYTES", 4 * 64 * 2048)
    monkeypatch.setattr(slab_sizes, "FEW_ROWS", 1024)

    def run(case: Case) -> list[tuple]:
        models = [
            [torch.zeros(n, h, dtype=DTYPE, requires_grad=True) for n in (case.tokens, case.vocab)]
            for h in case.hidden
        ]
        if case.operation == "linear_reverse_kl":
            kernels.linear_reverse_kl(*models)
            return made
        position = torch.arange(case.tokens)
        if case.operation == "linear_divergence":
            with torch.set_grad_enabled(case.mode != "forward"):
                kernels.linear_divergence(
                    models[0],
                    [tensor.detach() for tensor in models[1]],
                    position < case.active,
                    kind="jsd",
                    workspace_mib=case.workspace_mib,
                )
            return made
        # In cispo only an advantage of 0 has no gradient. It is every fourth token's, so that all
        # chunks have as many.
        advantages = torch.where(position % 4 < 4 * case.clipped, 0.0, 1.0)
        with torch.set_grad_enabled(case.mode != "forward"):
            loss, _ = kernels.linear_policy_loss(
                *models[0],
                torch.zeros(case.tokens, dtype=torch.int64),
                None,
                advantages,
                position < case.active,
                loss=kernels.PolicyLoss("cispo"),
                normalizer=1.0,
                workspace_mib=case.workspace_mib,
            )
        if case.mode != "forward":
            loss.backward()
        return made

    return run


SMALL_HEAD = (3000, (32,), 331)


@pytest.mark.parametrize(
    ("case", "way"),
    [
        (Case("linear_policy_loss", "forward", *SMALL_HEAD, workspace_mib=8), "slabs"),
        (Case("linear_policy_loss", "both", *SMALL_HEAD, workspace_mib=8), "kept"),
        (Case("linear_policy_loss", "both", *SMALL_HEAD, 0.2, 0.25, 8), "kept"),
        (Case("linear_policy_loss", "both", 3000, (1600,), 331, workspace_mib=3), "kept, shared"),
        (Case("linear_policy_loss", "both", 3000, (1600,), 331, 0, 0.25, 3), "kept, shared"),
        (Case("linear_policy_loss", "both", *SMALL_HEAD, workspace_mib=2), "2 chunks"),
        (Case("linear_policy_loss", "both", *SMALL_HEAD, 0, 0.25, 2), "2 chunks"),
        (Case("linear_policy_loss", "both", *SMALL_HEAD, 0.2, 0.25, 1), "columns"),
        (Case("linear_reverse_kl", "forward", 3000, (32, 48), 331), "slabs"),
        (Case("linear_divergence", "both", 3000, (32, 48), 331, 0.2, workspace_mib=3), "3 chunks"),
        (Case("linear_divergence", "forward", 3000, (32, 48), 331, workspace_mib=32), "1 chunks"),
    ],
    ids=str,
)
def test_products_are_those_of_the_code(products_of_code, case, way):
    run = Recorder()
    list(OPERATIONS[case.operation](run, case))
    assert run.ways == [way]
    assert run.products and run.products == products_of_code(case)


@pytest.mark.parametrize(
    ("case", "ways"),
    [
        (Case("linear_policy_loss", "both", *LLAMA), ["kept"]),
        (Case("linear_policy_loss", "both", *QWEN), ["kept, shared"]),
        (Case("linear_policy_loss", "both", 16384, (1536,), 151936), ["2 chunks"]),
        (Case("linear_logps", "both", 16384, (1536,), 151936), ["columns"]),
        (Case("linear_logps", "both", *QWEN, workspace_mib=512), ["columns"]),
        (Case("linear_policy_loss", "forward", *QWEN), ["slabs"]),
        (Case("codistill_losses", "both", 8192, (1536, 3584), 151936), ["kept", "kept"]),
    ],
    ids=str,
)
def test_ways(case, ways):
    assert predict(H200, case).ways == ways


def test_a_product_by_hand():
    """[256, 512] x [512, 768]: 2 x 3 tiles on 2 multiprocessors are 3 whole waves; 5 tiles are
    2.5, and take as long."""
    flops = 2 * 256 * 512 * 768
    assert SMALL.product(256, 768, 512, out_bytes=0) == pytest.approx(2 * (256 + 768) * 512 / 1e9)
    fast = dataclasses.replace(SMALL, copy=1e15)
    assert fast.product(256, 768, 512, out_bytes=4) == pytest.approx(flops / 1e12)
    five = fast.product(128, 1280, 512, out_bytes=4)
    assert five == pytest.approx(2 * 128 * 1280 * 512 / 1e12 * 3 / 2.5)
    added = SMALL.product(256, 768, 512, out_bytes=4, add=True)
    whole = SMALL.product(256, 768, 512, out_bytes=4)
    assert added - whole == pytest.approx(EXPOSED * 8 * 256 * 768 / 1e9)


def test_a_pass_by_hand():
    """On 1e9 bytes/s against 2 x 128 x 1.75e9 x 0.7 instructions/s."""
    assert SMALL.logits(4e9, 1e9, 24) == pytest.approx(4.0)
    assert SMALL.logits(4e9, 1e12, 24) == pytest.approx(24e12 / (2 * 128 * 1.75e9 * 0.7))


def test_sizes_are_those_of_the_code(monkeypatch):
    case = Case("linear_logps", "both", *QWEN)
    before = predict(H200, case)
    monkeypatch.setattr(slab_sizes, "SEGMENT", slab_sizes.SEGMENT // 8)
    monkeypatch.setattr(slab_sizes, "SLAB_BYTES", slab_sizes.SLAB_BYTES // 8)
    narrow = predict(H200, case)
    assert narrow.parts["launches"] > before.parts["launches"] + 500 * LAUNCH
    assert narrow.ms > before.ms
    monkeypatch.undo()
    monkeypatch.setattr(slab_sizes, "ROWS", 1024)
    forward = dataclasses.replace(case, mode="forward")
    assert predict(H200, forward).gib < 0.3 * 0.125
    monkeypatch.setattr(slab_sizes, "WORKSPACE_MIB", 512)
    assert predict(H200, case).ways == ["columns"]


def test_what_has_no_gradient_costs():
    """Masked tokens save their share of the time; clipped ones save less: the rest is gathered."""
    whole = Case("linear_policy_loss", "both", *QWEN)
    masked, clipped = (
        predict(H200, dataclasses.replace(whole, **{name: 0.3})) for name in ("inactive", "clipped")
    )
    assert masked.ms < 0.78 * predict(H200, whole).ms
    assert masked.ms < clipped.ms < predict(H200, whole).ms
    assert masked.gib < clipped.gib


def test_memory_of_the_shared_way():
    """Exponentials, v x and the first slice's gradient in bf16, and dx in fp32."""
    tokens, (hidden,), vocab = QWEN
    expected = 2 * tokens * vocab + 6 * tokens * hidden + 2 * 8192 * hidden
    found = predict(H200, Case("linear_logps", "both", *QWEN)).gib
    assert found == pytest.approx(expected / 2**30)


def test_memory_of_a_divergence():
    """Logits of both models for a quarter of the tokens, the student's gradients in fp32, and of a
    chunk dx, its hidden states and a piece of the rounded gradient of its logits."""
    tokens, (hidden, large), vocab = 8192, (1536, 3584), 151936
    rows, columns = tokens // 4, slab_sizes.padded_columns(vocab)
    chunk = rows * ((4 + 2) * hidden + 2 * pair_chunks.COLUMNS)
    expected = 4 * hidden * (tokens + vocab) + 2 * 4 * rows * columns + chunk
    case = Case("linear_divergence", "both", tokens, (hidden, large), vocab)
    assert predict(H200, case).ways == ["4 chunks"]
    assert predict(H200, case).gib == pytest.approx(expected / 2**30)


def test_both_is_forward_and_backward_of_a_training_step():
    """The forward pass alone keeps nothing, so it is shorter than that of a training step."""
    for operation in ("linear_logps", "linear_policy_loss"):
        modes = ("forward", "backward", "both")
        forward, backward, both = (predict(H100, Case(operation, m, *QWEN)).ms for m in modes)
        assert forward < both - backward < 1.1 * forward


def test_csv(tmp_path, capsys):
    path = tmp_path / "roofline.csv"
    assert main(["--csv", "--output", str(path)]) == 0
    table = Table(path, Line, column_names(Line)[:7])
    rows = table.read()
    assert {row.device for row in rows} == {"H200", "H100", "B200", "A100"}
    assert {row.operation for row in rows} == set(OPERATIONS)
    assert len({table.key_of(row) for row in rows}) == len(rows)
    for row in rows:
        assert row.tokens > 0 and row.vocab > 0 and row.dtype == "bf16"
        assert row.ms > 0 and row.gib >= 0
        assert (row.hidden == 0) == (row.operation == "selective_logps")
    assert {row.hidden for row in rows if row.operation == "linear_reverse_kl"} == {5120}
    assert main(["--csv", "--device", "H100"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == ",".join(column_names(Line)) and len(printed) == 1 + len(rows) / 4


def test_table(capsys):
    assert main(["--device", "H200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("  met") for line in lines) == len(GOALS)


@pytest.mark.parametrize(
    "arguments", [["--device", "V100"], ["--output", "x.csv"], ["--csv", "--output", "/no/x.csv"]]
)
def test_mistakes_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and arguments[-2] in capsys.readouterr().err


def test_names_of_gpus():
    assert device_named("NVIDIA H100 80GB HBM3") is H100
    assert device_named("NVIDIA A100-SXM4-80GB").name == "A100"
    assert device_named("AMD EPYC, 2 cores") is device_named("NVIDIA GH200 480GB") is None


def test_beside_measurements():
    shape = Shape("Qwen3-8B", 8192, 4096, 151936)
    name = "NVIDIA H200"
    given = roofline_ms(name, "linear_logps", shape, "both", "bf16", None)
    assert given == predict(H200, Case("linear_logps", "both", *QWEN)).ms
    loss = roofline_ms(name, "linear_policy_loss", shape, "both", "bf16", None)
    cross_entropy = roofline_ms(name, "linear_cross_entropy", shape, "both", "bf16", None)
    assert given < cross_entropy < loss  # the loss has clipped tokens
    assert roofline_ms(name, "linear_logps", shape, "both", "fp32", None) is None
    assert roofline_ms(name, "kd_rewards", Shape("x", 8), "forward", "bf16", None) is None


def test_beside_measurements_on_a_cpu():
    """2, 6 and 8 N H V at the rate of the matmul, and 2 more for a teacher."""
    for vocab, of_logps in ((1000, 6), (200_000, 8)):  # the second one's logits do not fit
        shape = Shape("x", 1000, 100, vocab, inactive=0.25, sequences=10)
        sizes = [
            roofline_ms("CPU", operation, shape, mode, "fp32", 1.0)
            for operation, mode in (
                ("linear_logps", "forward"),
                ("linear_policy_loss", "both"),
                ("linear_logps", "both"),
            )
        ]
        products = shape.active * 100 * vocab / 1e9
        assert sizes == pytest.approx([2 * products, 6 * products, of_logps * products])
    assert roofline_ms("CPU", "kd_rewards", shape, "forward", "fp32", None) is None
    taught = dataclasses.replace(shape, large_hidden=300, has_teacher=True)
    found = roofline_ms("CPU", "linear_divergence", taught, "both", "fp32", 1.0)
    assert found == pytest.approx((6 * 100 + 2 * 300) * shape.active * 200_000 / 1e9)


def test_tables_from_before_the_column(make_row, tmp_path):
    path = tmp_path / "gpu.csv"
    results.table(path).add([make_row()])
    lines = path.read_text().splitlines()
    assert lines[0].endswith(",roofline_ms")
    path.write_text("\n".join(line.rsplit(",", 1)[0] for line in lines) + "\n")
    assert results.table(path).read() == results.read_all(tmp_path) == [make_row()]
    new = make_row(mode="forward", roofline_ms=8.2)
    results.table(path).add([new])
    assert results.table(path).read() == [make_row(), new]
    assert cell(new) == "10 ms, 100 MiB, 75%, 82% of roofline"


@pytest.mark.parametrize(
    "operation", ["linear_policy_loss", "codistill_losses", "linear_divergence"]
)
@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_needed_work_is_that_of_the_benchmark(operation, mode):
    shape = Shape("x", 1000, 100, 300, inactive=0.25, sequences=5)
    if operation != "linear_policy_loss":
        shape = dataclasses.replace(shape, large_hidden=200)
    shape = dataclasses.replace(shape, has_teacher=operation == "linear_divergence")
    case = Case(operation, mode, 1000, shape.hidden_sizes, 300, inactive=0.25)
    assert case.needed_flops == operations.OPERATIONS[operation].flops(shape, mode)
