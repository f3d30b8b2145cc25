"""The supported operators, one module for each family, interval and linear rules side by side."""

from robust_core.certificates.bounds.operators.activation import Activation, Rectifier, SShape
from robust_core.certificates.bounds.operators.affine import Convolution, Dense, Scale, TransposedConvolution
from robust_core.certificates.bounds.operators.arithmetic import Concat, Piece, Rearrange, Sum
from robust_core.certificates.bounds.operators.base import Affine, Operator, Shape, adjoint, contract
from robust_core.certificates.bounds.operators.normalisation import BatchNorm
from robust_core.certificates.bounds.operators.pooling import Average, MaxPool

__all__ = [
    "Activation",
    "Affine",
    "Average",
    "BatchNorm",
    "Concat",
    "Convolution",
    "Dense",
    "MaxPool",
    "Operator",
    "Piece",
    "Rearrange",
    "Rectifier",
    "SShape",
    "Scale",
    "Shape",
    "Sum",
    "TransposedConvolution",
    "adjoint",
    "contract",
]
