"""Triton kernels of every operation, one module an operation, and the launchers that run them.

The launchers take tensors that their callers have checked, allocate what they return, and register
nothing: torch.library sees them through the modules of the same names one folder up.
"""
