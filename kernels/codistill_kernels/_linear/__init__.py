"""Passes over the logits of a linear head, [N, V] numbers of which few are in memory at once.

inputs.py                 checked arguments of the public functions
head.py                   what a head is
chunks.py                 what a backend does: the protocol `Chunks`
planning.py               which backend, which way through the logits, how much memory
passes.py                 the order of the chunks, and the sums of their gradients
logps.py                  log-probabilities and entropies from statistics
torch_backend.py          `TorchChunks`: plain PyTorch, the arithmetic in softmax_torch.py
cpu_backend.py            `CpuChunks`: C++, the arithmetic in csrc/
triton_backend.py         `TritonChunks`: products by cuBLAS (products.py), a piece of the logits
                          at a time (slab_sizes.py, slabs.py), the softmax in Triton
                          (softmax_triton.py), its exponentials (exponentials_triton.py)
"""
