"""Every block of Python of docs/distillation.md runs, one after the other."""

import re
from pathlib import Path

import pytest
import torch
from numerics import DEVICE, seeded

TEXT = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
TITLES = [block.split("\n")[0] for block in BLOCKS]


def make_names() -> dict:
    """What the blocks take for granted."""
    tokens, generator = 12, seeded(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    names = dict(
        student_hidden=normal(tokens, 16).requires_grad_(),
        student_head=normal(960, 16).requires_grad_(),
        teacher_hidden=normal(tokens, 24),
        teacher_head=normal(1024, 24),
        teacher_bias=normal(1024),
        teacher_logps=-normal(tokens).abs(),
        token_ids=torch.arange(tokens),
        token_weights=normal(tokens),
        mask=torch.arange(tokens) % 4 != 3,
        task_rewards=normal(3),
        cu_seqlens=torch.tensor([0, 4, 8, 12]),
    )
    return names | dict(num_loss_tokens=names["mask"].sum())


def test_blocks_run():
    assert len(BLOCKS) == 6
    names = make_names()
    for block in BLOCKS:
        names["student_hidden"].grad = names["student_head"].grad = None
        exec(block, names)
        if "backward()" in block:
            assert names["student_hidden"].grad.any() and names["student_head"].grad.any()
    assert names["rewards"].shape == (3,) and names["kl"].shape == (12,)


@pytest.mark.skipif(DEVICE != "cpu", reason="names are looked up once")
def test_names_in_the_text_exist():
    import codistill_kernels
    from codistill_kernels._divergences import DIVERGENCES
    from codistill_kernels._estimators import ESTIMATORS

    functions = set(re.findall(r"`(linear_\w+|kd_\w+|kl_\w+)[`(]", TEXT))
    assert functions and all(hasattr(codistill_kernels, name) for name in functions)
    assert all(f"`{name}`" in TEXT for name in ESTIMATORS)
    assert all(f'"{name}"' in TEXT for name in DIVERGENCES)
