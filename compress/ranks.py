"""The processes (ranks) of one run under torchrun: what they send each other, and how all end when one fails.

A single process is rank 0 of 1 and imports no torch here. Decisions are sent through the default group, by gloo, which
waits without using a core; gradients have their own group.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

from compress.errors import CompressError
from export.command.main import CRASH, INTERRUPTED, MISTAKE
from export.errors import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
MEETING = timedelta(minutes=5)  # for all ranks to start; importing torch from a slow disk takes a minute
PATIENCE = timedelta(days=7)  # others wait while rank 0 exports and measures; `_Watch` ends them if it dies
TICK_S = 1.0
SILENT_TICKS = 30  # a rank without a beat for this long is dead; counted in ticks, as a sleeping machine has none
LOST_TICKS = 5  # the same after a lost connection
FAILURE, NONE = "failure", "none"


class Failure(NamedTuple):
    """Why all ranks end: the rank that reports it, its host, the exit code and the message."""

    by: int
    host: str
    code: int
    text: str


def ranks() -> int:
    """Return the number of processes that run the recipe."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number among all ranks."""
    return int(os.environ.get("RANK", "0")) if ranks() > 1 else 0


def local_ranks() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier() -> None:
    """Wait for all ranks."""
    if ranks() > 1:
        import torch.distributed as dist

        dist.barrier()


def first_decides(decide: Callable[[], T]) -> T:
    """Return rank 0's decision on every rank, as clocks, machines, file systems and last digits differ between ranks."""
    if ranks() == 1:
        return decide()
    import torch.distributed as dist

    decision = [decide() if rank() == 0 else None]
    dist.broadcast_object_list(decision)
    return decision[0]  # type: ignore[return-value]


def share_(tensors: Iterable["torch.Tensor"], group: "dist.ProcessGroup | None") -> None:
    """Copy rank 0's tensors to every rank."""
    barrier()  # rank 0 may have been busy for longer than the group's timeout
    if ranks() > 1:
        import torch
        import torch.distributed as dist

        for tensor in tensors:
            plain = tensor.detach().contiguous()  # ranks may have different memory formats
            dist.broadcast(plain, 0, group=group)
            with torch.no_grad():
                tensor.copy_(plain)


def gather(value: T) -> list[T]:
    """Return every rank's value, by rank."""
    if ranks() == 1:
        return [value]
    import torch.distributed as dist

    values: list[T] = [value] * ranks()
    dist.all_gather_object(values, value)
    return values


def tell_torchrun(text: str) -> None:
    """Give torchrun's summary the reason why this rank fails."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": text}), encoding="utf-8")


@contextmanager
def joined() -> Iterator[None]:
    """Connect to the other ranks, wait for them at the end, and end all where one fails.

    Where another rank fails or dies, this process exits at once with that rank's exit code. This rank's own error is
    raised; a UserError's message then names the rank. Raises CompressError where the ranks do not connect.
    """
    if ranks() == 1:
        yield
        return
    import torch.distributed as dist

    store = _meet()
    watch = _Watch(store.clone())
    try:
        dist.init_process_group("gloo", store=store, rank=rank(), world_size=ranks(), timeout=PATIENCE)
        yield
        dist.barrier()
    except BaseException as error:
        watch.fail(error)
        raise
    watch.stop()
    dist.barrier()  # all watches have stopped, so rank 0 may end, and the store with it
    dist.destroy_process_group()


def _meet() -> "Store":
    """Return the ranks' common store once all are connected."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        store: Store = next(rendezvous("env://", timeout=MEETING))[0]
        if rank() == 0:
            store.set(FAILURE, NONE)
        store.set(_beat(rank()), socket.gethostname())
        store.wait([FAILURE, *map(_beat, range(ranks()))], MEETING)
    except (ValueError, dist.DistError) as error:
        reason = str(error).partition("\n")[0]
        raise CompressError(
            f"rank {rank()}: {ranks()} ranks did not connect ({reason}); start all with torchrun within {MEETING.seconds} seconds"
        ) from error
    return store


class _Watch:
    """Threads that send this rank's heartbeat, and end the process when another rank fails or goes silent.

    A rank that waits for another is in C++, where no exception reaches it, so its process must end.
    """

    def __init__(self, store: "Store") -> None:
        """Take a connection that nothing else uses, as others' waits would block it."""
        self._store, self._stopped, self._lost = store, threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._turns = 0
        self._threads = [threading.Thread(target=part, daemon=True) for part in (self._listen, self._guard)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop the threads."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def fail(self, error: BaseException) -> None:
        """Report this rank's error to the others; end here where another's came first, or caused it."""
        import torch.distributed as dist

        if isinstance(error, dist.DistError) or "gloo" in str(error):
            self._lost.set()
            time.sleep((LOST_TICKS + 3) * TICK_S)  # the thread finds the dead rank, and ends this process
        mistake = isinstance(error, UserError)
        text = str(error) if mistake else f"{type(error).__name__}: {error}".partition("\n")[0]
        code = MISTAKE if mistake else INTERRUPTED if isinstance(error, KeyboardInterrupt) else CRASH
        mine = Failure(rank(), socket.gethostname(), code, f"rank {rank()}: {text}")
        try:
            if (first := self._claim(mine)) != mine:
                self._end(first)
        except dist.DistError:  # rank 0 ended, and the store with it; the thread is about to report that
            time.sleep(3 * TICK_S)
        tell_torchrun(mine.text)
        _let_others_read()
        if mistake:
            error.args = (mine.text,)

    def _listen(self) -> None:
        import torch.distributed as dist

        others = [number for number in range(ranks()) if number != rank()]
        beats, silent, host = dict.fromkeys(others, ""), dict.fromkeys(others, 0), socket.gethostname()
        while not self._stopped.wait(TICK_S):
            self._turns += 1
            try:
                self._store.set(_beat(rank()), f"{host} {self._turns}")
                failure, *heard = (value.decode() for value in self._store.multi_get([FAILURE, *map(_beat, others)]))
                if failure != NONE:
                    self._follow(Failure(*json.loads(failure)))
                silent = {n: silent[n] + 1 if beat == beats[n] else 0 for n, beat in zip(others, heard, strict=True)}
                beats = dict(zip(others, heard, strict=True))
                dead = [n for n in others if silent[n] > (LOST_TICKS if self._lost.is_set() else SILENT_TICKS)]
                if dead:
                    self._end(self._claim(_death(dead[0], beats[dead[0]].partition(" ")[0])))
            except dist.DistError:
                self._end_with_store()

    def _guard(self) -> None:
        """End where the store no longer responds: calls to a machine without power never return."""
        seen = silent = 0
        while not self._stopped.wait(TICK_S):
            seen, silent = self._turns, silent + 1 if self._turns == seen else 0
            if silent > SILENT_TICKS:
                self._end_with_store()

    def _end_with_store(self) -> NoReturn:
        """End because the store is gone, and rank 0 with it."""
        self._end(_death(0, os.environ["MASTER_ADDR"])._replace(by=1, host=""))

    def _follow(self, failure: Failure) -> None:
        """End with the failure's exit code; if it is this rank's own, only after giving it time to end by itself."""
        if failure.by == rank():
            time.sleep(10 * TICK_S)
            os._exit(failure.code)
        self._end(failure)

    def _claim(self, failure: Failure) -> Failure:
        """Return the first failure that any rank reported: this one, if none was before."""
        return Failure(*json.loads(self._store.compare_set(FAILURE, NONE, json.dumps(failure))))

    def _end(self, failure: Failure) -> NoReturn:
        """End this process now; on each machine one rank prints the reason."""
        self._ending.acquire()  # never released: only one thread may do this
        if failure.by == rank() or (failure.host != socket.gethostname() and local_rank() == 0):
            shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a live line hides the cursor
            sys.stderr.write(f"{shown}{failure.text}\n")
        sys.stderr.flush()
        sys.stdout.flush()
        _let_others_read()
        os._exit(failure.code)


def _beat(number: int) -> str:
    return f"beat/{number}"


def _death(number: int, host: str) -> Failure:
    text = (
        f"rank {number} on {host} ended without a message: it was killed, perhaps for its memory, or its machine failed; "
        "the same command continues from the last checkpoint"
    )
    return Failure(rank(), socket.gethostname(), CRASH, text)


def _let_others_read() -> None:
    """Wait on rank 0, which may hold the store, until the others have read it."""
    if rank() == 0:
        time.sleep(3 * TICK_S)
