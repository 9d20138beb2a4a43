"""A clock for the stages of this engine's passes: each task is timed on its own."""

from array import array
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
    from nbfftconv.direct import dense, depthwise, last, split_dense
    from nbfftconv.passes import forward

    for programs in (forward.recorded_program, *(each._program for each in (dense, depthwise, last, split_dense))):
        programs.cache_clear()  # they have asked for their stages' addresses

    names: dict[int, str] = {}
    seconds: dict[str, float] = defaultdict(float)
    address_of, run_rows = jit.Callback.address, threads.TaskTable._run_rows

    def note_name(callback: jit.Callback, real: type) -> int:
        address = address_of(callback, real)
        function = callback._compiled[real].__wrapped__
        names[address] = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        return address

    def timed_rows(table: threads.TaskTable, words: "array[int]", rows: range) -> None:
        for index, row in enumerate(rows):
            one = rows[index : index + 1]
            seconds[names[words[row]]] += seconds_of(lambda one=one: run_rows(table, words, one))

    jit.Callback.address, threads.TaskTable._run_rows = note_name, timed_rows  # type: ignore
    return seconds
