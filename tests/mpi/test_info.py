"""``mpicoll info`` on several ranks."""

from __future__ import annotations

import os

from mpi4py import MPI

from mpicoll import info


def test_every_rank_gets_the_same() -> None:
    comm = MPI.COMM_WORLD
    facts = info.gather()
    assert comm.allgather(facts) == [facts] * comm.size
    assert len(facts["ranks"]) == comm.size
    assert facts["ranks"][comm.rank]["cpus"] == sorted(os.sched_getaffinity(0))
    assert f"{comm.size} on 1 node" in info.render(facts)


def test_probe_is_not_part_of_this_job() -> None:
    """A rank starts another MPI program, which must not take itself for a rank of this job."""
    program = "from mpi4py import MPI; print('sending', MPI.COMM_WORLD.allreduce(1) == 1 and 'right')"
    assert info.probe(program)["aware"] is True
