"""Implementations of the primitives: one module each, with the functions that :mod:`fusedres.backends.eager` defines."""
