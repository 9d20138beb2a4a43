"""The queue of a process: bounded, emptied by a few threads, which take images of one shape together.

Threads begin after a fork, when the server of a worker does, and never touch its event loop but to hand over results.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

_log = logging.getLogger("uvicorn.error")


class Full(Exception):
    """There is no room in the queue."""


@dataclass(eq=False)
class Job:
    """A request that waits for its answer.

    Attributes
    ----------
    body : bytes
        As it was uploaded.
    size, shape : tuple of int
        Height and width: of the image, and of what it is filled up to.
    kind : str
        Of answer.
    arrived, begun, ended : float
        When it was put into the queue, taken out of it, and answered, by `time.perf_counter`.
    batch : int
        Images of the batch that it was computed in.
    future : Future
        Of the answer.
    """

    body: bytes
    size: tuple[int, int]
    shape: tuple[int, int]
    kind: str
    arrived: float = field(default_factory=time.perf_counter)
    begun: float = 0.0
    ended: float = 0.0
    batch: int = 0
    future: "Future[bytes]" = field(default_factory=Future)


class Batcher:
    """A queue and its threads.

    Parameters
    ----------
    compute : callable
        Called with jobs of one shape; has to set the results of their futures.
    most : callable
        Returns how many images of a shape are worth collecting.
    threads : int
        That compute at once.
    limit : int
        Jobs that wait, at most; those that are computed do not count.
    wait : float
        Seconds that a job waits for others of its shape while a thread is free.
    """

    def __init__(
        self,
        compute: Callable[[list[Job]], None],
        most: Callable[[tuple[int, int]], int],
        threads: int,
        limit: int,
        wait: float,
    ) -> None:
        self._compute, self._most, self._limit, self._wait = compute, most, limit, wait
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._is_stopping = False
        self._threads = [threading.Thread(target=self._work, name=f"compute-{n}") for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job) -> None:
        """Let a job wait; raise `Full` if too many do."""
        with self._changed:
            if len(self._jobs) >= self._limit or self._is_stopping:
                raise Full
            self._jobs.append(job)
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._jobs)

    def is_working(self) -> bool:
        """Return whether all threads live, and there is room in the queue."""
        return not self._is_stopping and len(self._jobs) < self._limit and all(map(_lives, self._threads))

    def stop(self) -> None:
        """Compute what waits, and end the threads."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self) -> list[Job]:
        """Return jobs of the shape of the one that has waited longest; none once all is done and no more come."""
        with self._changed:
            while self._jobs or not self._is_stopping:
                if not self._jobs:
                    self._changed.wait()
                    continue
                first = self._jobs[0]
                most = self._most(first.shape)
                jobs = [job for job in self._jobs if job.shape == first.shape][:most]
                left = first.arrived + self._wait - time.perf_counter()
                if len(jobs) == most or left <= 0 or self._is_stopping:
                    for job in jobs:
                        self._jobs.remove(job)
                    return jobs
                self._changed.wait(left)
        return []

    def _work(self) -> None:
        while jobs := self._take():
            now = time.perf_counter()
            for job in jobs:
                job.begun = now
            # those that nobody waits for any more are left out
            wanted = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if not wanted:
                continue
            try:
                self._compute(wanted)
            except Exception as error:
                _log.exception("a batch of %d images was not computed", len(wanted))
                for job in wanted:
                    if not job.future.done():
                        job.future.set_exception(error)


def _lives(thread: threading.Thread) -> bool:
    return thread.is_alive()
