"""A program that looks at its world as mpicoll does, and says what came of it."""

import os

from mpi4py import MPI

from mpicoll.placement import LaunchError, check_world

try:
    check_world(MPI.COMM_WORLD.size, os.environ, MPI.Get_library_version())
    print(f"{MPI.COMM_WORLD.size} ranks, and that is right", flush=True)
except LaunchError as error:
    print(f"LaunchError: {error}", flush=True)
