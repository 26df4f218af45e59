"""What a training does, for a recorder: forward, loss, backward, update, data, evaluation, checkpoint.

On a GPU these are the times that the host spends on giving it work.
"""

from __future__ import annotations

from typing import Any

from mpicoll.trace.chrome import WAIT
from mpicoll.trace.recorder import Recorder
from mpicoll.train.keeping import Keeper
from mpicoll.train.loop import Trainer
from mpicoll.train.strategies.allreduce import Allreduce


def watch_training(recorder: Recorder, trainer: Trainer, keeper: Keeper) -> None:
    """Record what ``trainer`` does from now on, also with fewer ranks."""
    recorder.watch(trainer, "evaluate", "evaluation")
    recorder.watch(trainer, "_batch", "data")
    if trainer.data.is_mapped:
        recorder.watch(trainer, "_draft", "data")  # which reads files
    recorder.watch(keeper, "keep", "checkpoint")
    _watch_parts(recorder, trainer)

    def remade(original: Any) -> Any:
        def make_parts(*args: Any) -> None:
            original(*args)
            _watch_parts(recorder, trainer)

        return make_parts

    recorder.replace(trainer, "_make_parts", remade)


def _watch_parts(recorder: Recorder, trainer: Trainer) -> None:
    """What is made anew when ranks are lost."""
    recorder.watch(trainer.model, "forward", "forward")
    recorder.watch(trainer.model, "backward", "backward")
    recorder.watch(trainer.backprop, "loss", "loss")
    recorder.watch(trainer.strategy.optimizer, "step", "update")
    if not isinstance(trainer.strategy, Allreduce):  # whose waiting is recorded where it waits
        recorder.watch_block(trainer.strategy, "communicating", "communication", WAIT)
