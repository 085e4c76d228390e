"""Processes of one gloo group that the tests hand functions to."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE = 300
"""Seconds that a function may take on its slowest rank."""


class Ranks:
    """``world`` processes, one thread each, which stay until `close`, so that each imports PyTorch once."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = self.folder / f"store-{secrets.token_hex(4)}"  # one that was used before is no meeting place
        self.pipes = []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world, store), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) on every rank; what each returned. AssertionError with a traceback if one raised."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        answers, failed = [], []
        for rank, pipe in enumerate(self.pipes):
            try:
                answer, error = pipe.recv() if pipe.poll(PATIENCE) else (None, "no answer")
            except EOFError:
                answer, error = None, "the process has ended"
            answers.append(answer)
            if error:
                failed.append(f"rank {rank}: {error}")
        if failed:
            self.close()  # the others may wait for one that is gone; the next call starts new ones
        assert not failed, "\n".join(failed)
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def _serve(pipe: Any, rank: int, world: int, store: Path) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE - 60)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        torch.manual_seed(0)
        try:
            answer, error = function(*args), None
            distributed.barrier()
        except Exception:
            answer, error = None, traceback.format_exc()
        pipe.send((answer, error))
    sys.stderr.flush()
    os._exit(0)  # past the threads of PyTorch's that may still be at work when an interpreter ends
