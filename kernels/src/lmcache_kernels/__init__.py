"""LMCache's data path in native code.

`cpu` moves chunks, `triton_kernels` does so on GPUs, `index` finds chunks. Core finds the first
two through `plugin`, and works without this package: its torch reference is slower.
"""
