"""Indexed data sets, offline loaders, label noise, imbalance, splits, views and corruptions.

>>> from robust_core.data import load
>>> load("digits", "test")
Dataset('digits/test', 351 samples, 10 classes, x (351, 1, 8, 8))
"""

from robust_core.data.dataset import Column, Dataset, LazyItems, as_dataset, to_unit_tensor
from robust_core.data.sources import Status, available, load, load_npz
from robust_core.data.tables import load_table

__all__ = ["Column", "Dataset", "LazyItems", "Status", "as_dataset", "available", "load", "load_npz", "load_table"]
__all__ += ["to_unit_tensor"]
