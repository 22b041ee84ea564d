"""Processes forked from one that has imported what their tests need: they start in no time."""

import multiprocessing

PRELOAD = ["fastkd.train", "fastkd.runs.runner", "fastkd.methods", "sklearn.datasets", "torch._dynamo"]


def forking():
    """The context of such processes. Their environment is that of the first one's start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def together(worker, number: int, *arguments, seconds: float = 120.0) -> None:
    """worker(rank, *arguments, failures) in `number` processes; fails with what one of them puts into failures."""
    context = forking()
    failures = context.SimpleQueue()
    started = [context.Process(target=worker, args=(rank, *arguments, failures)) for rank in range(number)]
    for process in started:
        process.start()
    for process in started:
        process.join(seconds)
    for process in started:
        if process.is_alive():
            process.kill()
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in started] == [0] * number
