"""Triton kernels, one file per operator: kernels first, then the functions that launch them.

Nothing is imported here: Triton is loaded with the first operator that is used.
"""
