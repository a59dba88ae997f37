"""Random networks and random sequences of a user's actions: does converting ever change what a model computes?

    python -m fusedres.testing.fuzz --seconds 60

Every case is drawn from a seed as a description (:mod:`.description`), written as the Python that a user would write (:mod:`.source`),
and run stepwise beside its converted twin (:mod:`.twins`, :mod:`.check`); one that differs is shrunk (:mod:`.shrink`).
"""
