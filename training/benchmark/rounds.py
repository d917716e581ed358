"""Run contestants in turn, and compare them round by round."""

import ctypes
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import psutil


def interleave(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Time every call in the order A B C A B C ..., so that a noisy machine slows all contestants alike.

    Returns:
        dict: contestant -> seconds of its timed calls, one for each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + warm_up):
        for name, call in contestants.items():
            begin = time.perf_counter()
            call()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def compare(seconds: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]], each: float = 1.0) -> dict:
    """Compute medians and ratios.

    Args:
        pairs: (a, b) for the ratio a/b.
        each: a divisor of the seconds, such as the number of pictures that a call draws.

    Returns:
        dict: `seconds` (median by contestant), `ratio_of_medians`, and `ratio_quartiles`: "a/b" -> [lower quartile,
        median, upper quartile] of the round-by-round ratio.
    """
    medians = {name: statistics.median(times) / each for name, times in seconds.items()}
    return {
        "seconds": medians,
        "ratio_of_medians": {f"{a}/{b}": medians[a] / medians[b] for a, b in pairs},
        "ratio_quartiles": {
            f"{a}/{b}": statistics.quantiles([x / y for x, y in zip(seconds[a], seconds[b], strict=True)], n=4)
            for a, b in pairs
        },
    }


def peak_bytes(build: Callable, call: Callable, *arguments) -> int:
    """Measure the peak memory of `call(build(*arguments), *arguments)` in a fresh process (Linux with glibc).

    Memory that the process held after `build` is not counted.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (build, call, arguments))


def _peak_bytes(build: Callable, call: Callable, arguments: tuple) -> int:
    built = build(*arguments)
    process, ended, peak = psutil.Process(), threading.Event(), [0]
    ctypes.CDLL(None).malloc_trim(0)  # memory that building freed must not serve the call uncounted
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call(built, *arguments)
    ended.set()
    watcher.join()
    return peak[0]


def print_ratios(figures: dict) -> None:
    for pair, value in figures["ratio_of_medians"].items():
        low, _, high = figures["ratio_quartiles"][pair]
        print(f"  {pair:36} {value:.3f} of the time (quartiles {low:.3f} to {high:.3f})")
