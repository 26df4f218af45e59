"""Data sets that lie in scikit-learn's own files: nothing is fetched from anywhere."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from mpicoll.train.data import Dataset, scaled, split
from mpicoll.train.errors import InputError


def read_digits(seed: int) -> Dataset:
    """1,797 images of 8 x 8 grey levels, handwritten digits."""
    digits = _sklearn_datasets("digits").load_digits()
    return scaled(split("digits", 10, digits.images, digits.target.astype(np.int64), seed), axis=None)


def read_diabetes(seed: int) -> Dataset:
    """442 patients, 10 measurements of each; to predict: how far diabetes has come a year later. Regression.

    Values and measurements are standardised, so that a mean squared error of 1 is that of always predicting
    the mean.
    """
    # Not scaled: scikit-learn would scale with the samples that the test is made of, too.
    x, y = _sklearn_datasets("diabetes").load_diabetes(return_X_y=True, scaled=False)
    return scaled(split("diabetes", 0, x, y[:, None], seed), axis=0)


def _sklearn_datasets(name: str) -> ModuleType:
    try:
        from sklearn import datasets  # takes a second, and only rank 0 needs it
    except ImportError as error:
        raise InputError(
            f"{name}: expected scikit-learn to be installed ({error}); pip install 'mpicoll[train]'"
        ) from error
    module: ModuleType = datasets
    return module
