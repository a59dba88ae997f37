"""CUDA C++ sources, compiled at first use; installed as ``fusedres.cuda``."""
