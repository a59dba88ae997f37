"""How right something is: the rule of parity, whole networks by that rule, and the primitive in which a wrong number begins.

    error, assert_parity                    one result against float64, by eager's own error
    run_training, compare, randomize        a module beside its converted copy
    measure, judge, Group, Errors           a network beside its converted copy, by groups of tensors
    assert_fused                            did every block really run on this backend?
    first_difference, Difference            the first primitive of a block whose result is not as right as eager's

Nothing of the package imports this; nothing here needs a test framework.
"""

from __future__ import annotations

from ..accuracy import allowance, error
from .difference import Difference, first_difference
from .networks import Errors, Group, judge, measure
from .parity import assert_all_parity, assert_fused, assert_parity, compare, randomize, run_training

__all__ = [
    "Difference",
    "Errors",
    "Group",
    "allowance",
    "assert_all_parity",
    "assert_fused",
    "assert_parity",
    "compare",
    "error",
    "first_difference",
    "judge",
    "measure",
    "randomize",
    "run_training",
]
