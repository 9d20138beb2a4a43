"""A clock for the stages of this engine's passes: each task is timed on its own."""

from collections import defaultdict

from rounds import seconds_of


def clock_stages() -> dict[str, float]:
    """Time every stage from now on, as long as this process lives; call it before a pass is run.

    Returns
    -------
    dict
        Seconds by the stage's module and name, added up until the caller clears it.
    """
    from nbfftconv import jit, threads  # each engine is imported by its own process only
    from nbfftconv.passes import forward

    forward.recorded_program.cache_clear()  # programs have asked for their stages' addresses

    names: dict[int, str] = {}
    seconds: dict[str, float] = defaultdict(float)
    address_of, run = jit.Callback.address, threads.run

    def note_name(callback: jit.Callback, real: type) -> int:
        address = address_of(callback, real)
        function = callback._compiled[real].__wrapped__
        names[address] = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        return address

    def timed_run(*tasks: threads.Task) -> None:
        for task in tasks:
            seconds[names[task.stage]] += seconds_of(lambda task=task: run(task))

    jit.Callback.address, threads.run = note_name, timed_run  # type: ignore
    return seconds
