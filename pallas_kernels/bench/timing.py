"""Time of a compiled call."""
import statistics
import time

import jax

QUEUED = 0.01  # seconds of calls that are queued together


def seconds(run, *args, limit):
    """Median time of a compiled call of `args`, in seconds.

    Short calls are queued back to back, up to 30 of them, so that launches hide behind the calls before them. Spends
    about `limit` seconds, more where fewer than 3 samples fit, but at most 5 times as long.
    """
    def queue(calls):
        start = time.perf_counter()
        for _ in range(calls):
            out = run(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    queue(1)
    calls = int(min(30, max(1, QUEUED / queue(1))))
    times, end = [], time.perf_counter() + limit
    while not times or time.perf_counter() < (end if len(times) >= 3 else end + 4 * limit):
        times.append(queue(calls))
    return statistics.median(times)
