"""Times calls side by side: all contenders once per round, caches emptied before each call, medians over the rounds.

A round sees the same state of the machine, so a ratio taken inside a round survives a machine that speeds up, slows
down or is shared; the ratio of two separate runs does not.
"""

import statistics
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}  # beyond the last-level cache of the machines we know
_HEAD_START = (
    12  # fills before a call on the GPU: 0.8 ms on an H200, in which the host queues the whole call. A call is
)
# timed as it runs behind other work; the autograd of a backward alone takes the host 0.3 ms.


class Stopwatch:
    def __init__(self, device: str, *, seconds: float = 1.0, least: int = 5, most: int = 50):
        """A contender is measured for about `seconds`, at least `least` and at most `most` times."""
        self.device, self.seconds, self.least, self.most = device, seconds, least, most
        self._flush = torch.empty(_FLUSH_BYTES[device], dtype=torch.uint8, device=device)

    def once(self, call: Callable) -> float:
        """Seconds of one call."""
        for _ in range(_HEAD_START if self.device == "cuda" else 1):
            self._flush.fill_(1)
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def rounds(self, calls: dict[str, Callable]) -> dict[str, list[float]]:
        """Seconds per call of every contender, round by round, after a warm-up of two calls each."""
        slowest = max(max(self.once(call), self.once(call)) for call in calls.values())
        count = min(self.most, max(self.least, round(self.seconds / slowest)))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(count):
            for name, call in calls.items():
                times[name].append(self.once(call))
        return times


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the ratios inside each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
