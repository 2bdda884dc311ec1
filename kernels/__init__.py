"""Triton kernels, one file an operator or a way of it: kernels first, then the functions that
launch them. What several have in common is in contrast.py and bank_access.py.

Nothing is imported here: Triton is loaded with the first operator that is used.
"""
