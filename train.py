"""Train a neural network on many processes: ``mpirun -np 4 python train.py``; see ``--help``."""

from mpicoll.train.cli import main

if __name__ == "__main__":
    main()
