"""Training on many processes: models, optimizers, data, strategies and the loop that joins them.

    comm = mpicoll.Communicator(MPI.COMM_WORLD)
    data = share(comm, read_digits(seed=0) if comm.rank == 0 else None)
    model = Sequential(Flatten(), Linear(64, 128), ReLU(), Linear(128, 10))
    strategy = AllreduceStrategy(comm, model, SGD(model.parameters, learning_rate=0.05))
    history = Trainer(comm, model, softmax_cross_entropy, data, strategy).train(epochs=20)

The same lines run on one rank and on many; ``cli.py`` is the command built on them.
"""

from mpicoll.train.data import Dataset, share
from mpicoll.train.errors import InputError, on_rank_zero
from mpicoll.train.loop import Epoch, Trainer, parameters_sha256
from mpicoll.train.model import (
    Flatten,
    Layer,
    Linear,
    ReLU,
    Sequential,
    mean_squared_error,
    perceptron,
    softmax_cross_entropy,
)
from mpicoll.train.optimizer import SGD, Optimizer
from mpicoll.train.readers import read_csv, read_digits, read_mnist
from mpicoll.train.strategies import AllreduceStrategy, Strategy

__all__ = [
    "SGD",
    "AllreduceStrategy",
    "Dataset",
    "Epoch",
    "Flatten",
    "InputError",
    "Layer",
    "Linear",
    "Optimizer",
    "ReLU",
    "Sequential",
    "Strategy",
    "Trainer",
    "mean_squared_error",
    "on_rank_zero",
    "parameters_sha256",
    "perceptron",
    "read_csv",
    "read_digits",
    "read_mnist",
    "share",
    "softmax_cross_entropy",
]
