"""Readers: data sets from scikit-learn, and from IDX, CIFAR-10, CSV and NumPy files.

They raise `InputError` for whatever is wrong with a file, naming the file, what was expected and what was
found there. One file per kind; all give a `Dataset`.
"""

from mpicoll.train.data import scaled
from mpicoll.train.readers.cifar import read_cifar10
from mpicoll.train.readers.csv_file import read_csv
from mpicoll.train.readers.idx import read_idx, read_mnist
from mpicoll.train.readers.npy import read_npy
from mpicoll.train.readers.sklearn_sets import read_diabetes, read_digits

__all__ = [
    "read_cifar10",
    "read_csv",
    "read_diabetes",
    "read_digits",
    "read_idx",
    "read_mnist",
    "read_npy",
    "scaled",
]
