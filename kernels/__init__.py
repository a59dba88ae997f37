"""Triton device code and its launchers, installed as ``fusedres.kernels``."""
