"""The kernels inside other codebases, one module per codebase.

A module imports its framework only when one of its functions is called, and `codistill_kernels`
imports none of them.
"""
