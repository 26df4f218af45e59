"""Training on many processes: models, optimizers, data, strategies and the loop that joins them.

    comm = mpicoll.Communicator(MPI.COMM_WORLD)
    data = share(comm, read_digits(seed=0) if comm.rank == 0 else None)
    layers = [Flatten(), Linear(64, 128), ReLU(), Linear(128, 10)]
    trainer = Trainer(comm, layers, data, optimizer=SGD(momentum=0.9), learning_rate=0.05)
    history = trainer.train(epochs=20)

The same lines run on one rank and on many; ``cli.py`` is the command built on them.
"""

from mpicoll.train.augmentation import Augmentation, parse_augmentation
from mpicoll.train.data import Dataset, share
from mpicoll.train.elastic import Lost, StateLostError, leave
from mpicoll.train.errors import InputError, on_rank_zero
from mpicoll.train.hashes import parameters_sha256
from mpicoll.train.keeping import Checkpoints, Keeper, resume
from mpicoll.train.layers import (
    GELU,
    AveragePool2d,
    BatchNorm,
    Context,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Tanh,
)
from mpicoll.train.learning_rate import LearningRate, scaled_rate
from mpicoll.train.loop import Epoch, Trainer
from mpicoll.train.losses import mean_squared_error, softmax_cross_entropy
from mpicoll.train.mesh import Mesh, make_mesh, parse_mesh
from mpicoll.train.model import Sequential
from mpicoll.train.networks import convolutional, perceptron
from mpicoll.train.optimizer import LARS, SGD, Adam, Optimizer
from mpicoll.train.preemption import PREEMPTED, Notice
from mpicoll.train.readers import read_cifar10, read_csv, read_diabetes, read_digits, read_mnist, read_npy
from mpicoll.train.strategies import STRATEGIES, Strategy

__all__ = [
    "GELU",
    "LARS",
    "PREEMPTED",
    "SGD",
    "STRATEGIES",
    "Adam",
    "Augmentation",
    "AveragePool2d",
    "BatchNorm",
    "Checkpoints",
    "Context",
    "Conv2d",
    "Dataset",
    "Dropout",
    "Epoch",
    "Flatten",
    "InputError",
    "Keeper",
    "Layer",
    "LearningRate",
    "Linear",
    "Lost",
    "MaxPool2d",
    "Mesh",
    "Notice",
    "Optimizer",
    "ReLU",
    "Sequential",
    "StateLostError",
    "Strategy",
    "Tanh",
    "Trainer",
    "convolutional",
    "leave",
    "make_mesh",
    "mean_squared_error",
    "on_rank_zero",
    "parameters_sha256",
    "parse_augmentation",
    "parse_mesh",
    "perceptron",
    "read_cifar10",
    "read_csv",
    "read_diabetes",
    "read_digits",
    "read_mnist",
    "read_npy",
    "resume",
    "scaled_rate",
    "share",
    "softmax_cross_entropy",
]
