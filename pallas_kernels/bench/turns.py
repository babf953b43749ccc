"""Tasks that compile side by side, each in one of several processes, and then run one at a time on a quiet machine.

`prepare(task)` compiles and returns a function, which runs when it is the task's turn: on its process, while all the
others wait. What raises an error, or kills its process, costs that task (and those the process holds) and no other.
"""

import contextlib
import multiprocessing
import time
from multiprocessing.connection import wait

GRACE = 60  # seconds for what still compiles at the limit, before its process is killed
EXIT = 20  # seconds for a process to end


def attempt(f, *arguments):
    """(result, None), or (None, what went wrong)."""
    try:
        return f(*arguments), None
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error)[:300]}"


def serve(prepare, queue, orders, stop):
    """One process: sends (task, error or None) for each task prepared, None, and then (result, error) of each order."""
    held = {}
    while (task := queue.get()) is not None:
        if time.time() < stop:
            held[task], error = attempt(prepare, task)
            orders.send((task, error))
    orders.send(None)
    while (order := orders.recv()) is not None:
        task, arguments = order
        orders.send(attempt(held.pop(task), *arguments))


def compile_all(tasks, prepare, jobs, limit):
    """({task: connection to the process that holds it}, {task: error}); no process compiles when this returns.

    `tasks` are taken in their order, none is begun more than `limit` seconds after the start. `prepare` is importable.
    """
    context = multiprocessing.get_context("spawn")
    queue, stop = context.SimpleQueue(), time.time() + limit
    processes = {}
    for _ in range(jobs):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(prepare, queue, theirs, stop), daemon=True)
        process.start()
        theirs.close()  # so that the connection ends with the process
        processes[ours] = process
    for task in [*tasks, *[None] * jobs]:
        queue.put(task)
    holders, errors, busy = {}, {}, set(processes)
    while busy:
        ready = wait(busy, timeout=max(1, stop + GRACE - time.time()))
        for late in () if ready else busy:
            processes[late].kill()
        for connection in ready:
            try:
                message = connection.recv()
            except EOFError:
                holders = {task: holder for task, holder in holders.items() if holder is not connection}
                message = None
            if message is None:
                busy.remove(connection)
            elif message[1]:
                errors[message[0]] = message[1]
            else:
                holders[message[0]] = connection
    return holders, errors


def run_all(tasks, holders, *arguments):
    """Yields (task, result, error) of the tasks held: all of the process that holds the first, then of the next.

    A process ends with its last task, and so gives back the memory that it has taken before another takes its own.
    """
    for process in dict.fromkeys(holders[task] for task in tasks if task in holders):
        for task in tasks:
            if holders.get(task) is not process:
                continue
            try:
                process.send((task, arguments))
                result, error = process.recv()
            except (EOFError, OSError):
                result, error = None, "its process died"
            yield task, result, error
        with contextlib.suppress(OSError):
            process.send(None)
            process.poll(EXIT)  # until the connection breaks
