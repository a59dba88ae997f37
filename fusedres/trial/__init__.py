"""``python -m fusedres try MODEL``: what fusedres makes of a model: what runs fused, whether it computes the same, how fast and in how much
memory, beside eager.

``models`` finds the model, ``measure`` measures it (``timing``, ``memory``), ``page`` shows what was found, ``command`` is the command.
"""
