"""In which pieces the Triton backend goes through the logits, and where they lie in memory."""

import pytest
import torch
from numerics import INTERPRETED

from codistill_kernels._linear import slab_sizes
from codistill_kernels._linear.chunks import Plan


@pytest.mark.skipif(INTERPRETED, reason="slabs are small there")
@pytest.mark.parametrize("rows", [1, 300, 1530, 4090, 4096, 5000, 8192, 20000])
@pytest.mark.parametrize("hidden", [64, 1536, 4096])
def test_gradient_never_overwrites_exponentials_that_are_not_read_yet(rows, hidden):
    vocab = 151665
    elements = slab_sizes.kept_elements(rows, vocab, hidden, shared=True)
    columns = list(slab_sizes.slices(rows, vocab, hidden, shared=True))
    start = elements - rows * slab_sizes.padded_columns(vocab)
    assert start >= 0 and columns[0].start == 0
    assert columns[-1].stop == slab_sizes.padded_columns(vocab)
    for one, following in zip(columns, columns[1:], strict=False):
        assert one.stop == following.start
        assert one.stop * hidden <= start + rows * one.stop  # the next slice is whole
        if one.stop - one.start > slab_sizes.SEGMENT:  # and so is this one: no buffer is needed
            assert one.stop * hidden <= start + rows * one.start


@pytest.mark.skipif(INTERPRETED, reason="slabs are small there")
def test_plans():
    """The workspace decides: everything, chunks of at least 2048 tokens, or nothing is kept."""
    gib, shape = 2**30, (151936, torch.bfloat16)
    assert slab_sizes.plan(8192, *shape, int(2.5 * gib)) == Plan("kept", 8192)
    assert slab_sizes.plan(16384, *shape, int(2.5 * gib)) == Plan("chunks", 8192)
    assert slab_sizes.plan(16384, *shape, gib) == Plan("chunks", 2731)
    assert slab_sizes.plan(16384, *shape, gib // 2).way == "columns"
    assert slab_sizes.plan(8, 100, torch.float16, gib).way == "columns"
    assert slab_sizes.shares_memory(8192, 151936, 4096, 2, int(2.5 * gib))
    assert not slab_sizes.shares_memory(4096, 128256, 4096, 2, int(2.5 * gib))
    assert not slab_sizes.shares_memory(8192, 151936, 1536, 2, int(2.5 * gib))
