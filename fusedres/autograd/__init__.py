"""The families of blocks as autograd nodes: each description with its forward and backward, sequences of primitives that run on every
backend. ``residual``, ``dense`` and ``transition`` are independent of each other; ``steps`` is what they share, ``exchange`` what
processes exchange for SyncBatchNorm."""
