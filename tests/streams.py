"""What streams are tested with: requests, and drawing that is a pure function of them."""

import contextlib
import dataclasses
import hashlib
import threading
import time

from fastscore.stats import OUTCOMES

# of every wait, so that what hangs fails
PATIENCE = 20


@dataclasses.dataclass(frozen=True)
class Ask:
    """A checked request; those of one sampler share batches."""

    label: str
    seed: int
    sampler: str | None

    @property
    def group(self):
        return self.sampler


class Sound:
    """A clip, equal where all of its request is equal; unlike bytes it can be watched."""

    def __init__(self, ask):
        self.bits = hashlib.sha256(repr(ask).encode()).hexdigest()

    def __eq__(self, other):
        return self.bits == other.bits

    __hash__ = None


def prepare(label, *, guidance, seed, first, steps, nfe, sampler):
    if label == "nobody":
        raise ValueError("label 'nobody' is unknown")
    return Ask(label, 0 if seed is None else seed, sampler)


def sound(job):
    if job.label == "diverges":
        raise ValueError(f"seed {job.seed} diverged")
    return Sound(job)


class Drawing:
    """Draws sounds, notes its batches, and stops in every one while its gate is shut."""

    def __init__(self, draw=sound):
        self.draw, self.batches = draw, []
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        self.gate.set()

    def __call__(self, jobs, abandoned):
        self.batches.append(jobs)
        self.begun.release()
        assert self.gate.wait(PATIENCE)
        return [self.draw(job) for job in jobs]

    @contextlib.contextmanager
    def busy(self, stream):
        """While this lasts, the stream computes one request of a group of its own."""
        self.gate.clear()
        future = stream.submit("first", sampler="busy")
        assert self.begun.acquire(timeout=PATIENCE)
        try:
            yield future
        finally:
            self.gate.set()

    @property
    def seeds(self):
        """Seeds of every batch but those of ``busy``."""
        return [[job.seed for job in b] for b in self.batches if b[0].sampler != "busy"]


class Endless:
    """Draws until nobody waits for it."""

    def __init__(self):
        self.begun, self.stopped, self.batches = threading.Event(), threading.Event(), 0

    def __call__(self, jobs, abandoned):
        self.batches += 1
        self.begun.set()
        while not abandoned():
            time.sleep(0)
        self.stopped.set()
        raise RuntimeError("stopped")


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def outcome_of(future):
    """What a future came to, without its text."""
    if future.cancelled():
        return "cancelled"
    return future.exception(PATIENCE) or future.result(PATIENCE)


def balanced(stats):
    """Whether every request accepted is accounted for."""
    open_requests = stats.waiting + stats.running
    return stats.requests == sum(getattr(stats, name) for name in OUTCOMES) + open_requests
