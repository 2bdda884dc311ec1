"""The operators as Python sees them: one file each, with its backends, fake and autograd
implementations.
"""
