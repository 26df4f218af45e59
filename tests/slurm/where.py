"""A program for `PROGRAM`: rank 0 prints, for each rank, its rank, node and GPUs, as a line of JSON."""

import json
import os
import platform

from mpi4py import MPI

about = (MPI.COMM_WORLD.rank, platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES"))
everyone = MPI.COMM_WORLD.gather(about)
if MPI.COMM_WORLD.rank == 0:
    print("where:", json.dumps(everyone), flush=True)
