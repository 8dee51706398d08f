"""Divergences of two linear heads, a student's and a teacher's, over the whole vocabulary.

inputs.py                 checked arguments of the public functions
divergences.py            the table of divergences, on rows of logits in plain PyTorch
divergences_triton.py     the same in Triton
chunks.py                 chunks of both models' logits, and the gradients' sums
cpu_backend.py            the same with the C++ library's products
reverse_kl.py             the divergence alone, without a gradient: PyTorch and C++
reverse_kl_triton.py      the same in Triton
"""
