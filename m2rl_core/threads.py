"""Threads of Python: work beside other work, and parts of one work side by side on the cores of this machine."""
from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence

import torch

STOPPING = 15.0  # seconds that a thread gets to end: what it waits for in C, a verifier or a tool, has limits of 10
LOOK = 0.2  # seconds after which a thread that waits for another sees that it is to stop


class Stopped(BaseException):
    """Ends a thread at its next step in Python."""


class Beside(threading.Thread):
    """`work()` in a thread that begins at `start()`; it does not keep the process alive."""

    def __init__(self, work: Callable, name: str):
        super().__init__(name=name, daemon=True)
        self.work, self.found, self.error = work, None, None
        self.over = threading.Event()  # Ctrl-C in `join` would have Python 3.11 take the thread for ended (bpo-45274)

    def run(self) -> None:
        try:
            self.found = self.work()
        except BaseException as error:  # whatever it is, the thread that waits raises it
            self.error = error
        finally:
            self.over.set()

    def result(self):
        """What `work` gave, or raises what it raised."""
        while not self.over.wait(LOOK):
            pass
        if self.error is not None:
            raise self.error
        return self.found

    def stop(self) -> None:
        """After `start()`: let it end as soon as it comes back to Python."""
        deadline = time.monotonic() + 1
        while self.ident is None and time.monotonic() < deadline:  # who started it was interrupted before it had begun
            time.sleep(0.001)
        if self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(Stopped))


def side_by_side(works: Sequence[Callable[[], None]], most: int) -> None:
    """Do all of `works`, at most `most` at once and no more than torch may use threads here, each with its share of them.

    In the order given, but any may end first. An error in one, or an interrupt, ends all, and is raised.
    """
    threads = torch.get_num_threads()
    lanes, left = min(threads, len(works), most), iter(works)

    def lane():
        torch.set_num_threads(threads // lanes)  # of this thread, and the default of those that begin later
        for work in left:
            work()

    if lanes < 2:
        for work in left:
            work()
        return
    running, begun = [Beside(lane, "m2rl-lane") for _ in range(lanes)], 0
    try:
        for one in running:
            begun += 1
            one.start()
        for one in running:
            one.result()
    except BaseException:
        for _ in left:
            pass  # nothing new is begun
        for one in running[:begun]:
            one.stop()
        for one in running[:begun]:
            if one.is_alive():
                one.join(STOPPING)
        raise
    finally:
        torch.set_num_threads(threads)
