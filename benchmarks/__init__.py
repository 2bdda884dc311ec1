"""Benchmarks of the kernels beside their peers, shipped as codir_fast.benchmarks.

`codir-fast bench` runs them, and so does `pytest benchmarks/bench_<operator>.py` from a checkout.
"""
