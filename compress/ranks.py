"""The processes of one run: torchrun starts several, each a rank. What they tell each other, and how all end when one does.

Only where there are several is torch imported; a process of its own is rank 0 of 1. Decisions travel on the default group, which is
gloo's and waits without using a core; gradients have a group of their own.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

from compress.errors import CompressError
from export.command.main import CRASH, INTERRUPTED, MISTAKE
from export.errors import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
MEETING = timedelta(minutes=5)  # in which every rank must have started; torch's import from a slow disk takes a minute
PATIENCE = timedelta(days=7)  # rank 0 exports and measures while the others wait; the watch ends what is dead
TICK_S = 1.0
SILENT_TICKS = 30  # without a beat, after which a rank is dead: of the listener's own, so that no machine's sleep is taken for death
LOST_TICKS = 5  # the same once a connection is lost
FAILURE, NONE = "failure", "none"


class Failure(NamedTuple):
    """Why all ranks end: which rank says so and where it runs, with what exit code, in which words."""

    by: int
    host: str
    code: int
    text: str


def ranks() -> int:
    """Return the number of processes that run the recipe."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number among them."""
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
    """Return on every rank what rank 0 decides; clocks, machines, file systems and last digits differ between ranks, decisions must not."""
    if ranks() == 1:
        return decide()
    import torch.distributed as dist

    said = [decide() if rank() == 0 else None]
    dist.broadcast_object_list(said)
    return said[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Return every rank's value, by rank."""
    if ranks() == 1:
        return [value]
    import torch.distributed as dist

    values: list[T] = [value] * ranks()
    dist.all_gather_object(values, value)
    return values


def tell_torchrun(text: str) -> None:
    """Let torchrun's summary say why this rank ends with an exit code other than 0."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": text}), encoding="utf-8")


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks: meet the others, wait for all of them at the end, and end them all where this one fails.

    Where another rank fails or is dead, this process ends in its middle, with that rank's exit code. An error of this rank goes on; a
    CompressError then says whose it is. Raises CompressError where the ranks do not meet.
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
    dist.barrier()  # nobody listens any more, so rank 0 may take the store with it
    dist.destroy_process_group()


def _meet() -> "Store":
    """Return the ranks' common store once all of them are there."""
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
            f"rank {rank()}: {ranks()} ranks did not meet ({reason}); start all of them with torchrun, within {MEETING.seconds} seconds"
        ) from error
    return store


class _Watch:
    """Threads that let the others hear this rank, and end it when one of them fails or is not heard any more.

    A rank that waits for another does so in C++, where no exception reaches it; so its process ends.
    """

    def __init__(self, store: "Store") -> None:
        """Take a connection of its own: another's waits would hold it up."""
        self._store, self._stopped, self._lost = store, threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._turns = 0
        self._threads = [threading.Thread(target=part, daemon=True) for part in (self._listen, self._guard)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Listen no more."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def fail(self, error: BaseException) -> None:
        """Tell the others of this rank's error; end here where theirs came first, or is its cause."""
        import torch.distributed as dist

        if isinstance(error, dist.DistError) or "gloo" in str(error):
            self._lost.set()
            time.sleep((LOST_TICKS + 3) * TICK_S)  # the thread finds out whose end it was, and ends this process
        mistake = isinstance(error, UserError)
        said = str(error) if mistake else f"{type(error).__name__}: {error}".partition("\n")[0]
        code = MISTAKE if mistake else INTERRUPTED if isinstance(error, KeyboardInterrupt) else CRASH
        mine = Failure(rank(), socket.gethostname(), code, f"rank {rank()}: {said}")
        try:
            if (first := self._claim(mine)) != mine:
                self._end(first)
        except dist.DistError:  # rank 0 is gone with the store, which the thread is about to say
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
        """End where the store does not answer any more: calls to a machine without power never come back."""
        seen = silent = 0
        while not self._stopped.wait(TICK_S):
            seen, silent = self._turns, silent + 1 if self._turns == seen else 0
            if silent > SILENT_TICKS:
                self._end_with_store()

    def _end_with_store(self) -> NoReturn:
        """End where the store has gone, and rank 0 with it."""
        self._end(_death(0, os.environ["MASTER_ADDR"])._replace(by=1, host=""))

    def _follow(self, failure: Failure) -> None:
        """End as the failure says; where it is this rank's own, only if that has not ended by itself."""
        if failure.by == rank():
            time.sleep(10 * TICK_S)
            os._exit(failure.code)
        self._end(failure)

    def _claim(self, failure: Failure) -> Failure:
        """Return the first failure that any rank has claimed: this one, if none has."""
        said = json.dumps(failure)
        return Failure(*json.loads(self._store.compare_set(FAILURE, NONE, said)))

    def _end(self, failure: Failure) -> NoReturn:
        """End this process now; on each machine one rank says why, if none has."""
        self._ending.acquire()  # for good: one thread is enough
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
        f"rank {number} on {host} ended without a word: it was killed, perhaps for its memory, or its machine is gone; "
        "the same command goes on from the last checkpoint"
    )
    return Failure(rank(), socket.gethostname(), CRASH, text)


def _let_others_read() -> None:
    """Wait where this rank may hold the store that the others are still to read."""
    if rank() == 0:
        time.sleep(3 * TICK_S)
