"""The conformance kit: one table kind -> checks, the same for our methods and for anyone's."""

from robust_core.testing.case import Case
from robust_core.testing.conformance import CHECKS, check_method

__all__ = ["CHECKS", "Case", "check_method"]
