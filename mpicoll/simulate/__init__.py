"""Times a schedule on a model of a machine: the schedule that runs, at scales that nobody here has.

`simulate` is the engine, `Machine.load` gives it a machine. See ``engine`` for what the model says,
``machine`` for what a machine file says, and ``training`` for what a training job would gain. NumPy only.
"""

from mpicoll.simulate.engine import Prediction, simulate, simulate_sizes
from mpicoll.simulate.machine import Level, Machine, MachineError

__all__ = ["Level", "Machine", "MachineError", "Prediction", "simulate", "simulate_sizes"]
