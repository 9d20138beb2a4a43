"""The kernels of a layer, kept from call to call in the forms that its plans need, within a bound."""

import itertools
import operator
from typing import Any

import numpy as np

from nbfftconv import memory, scratch
from nbfftconv.arrays import compact
from nbfftconv.forking import fork_safe_lock
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import Kernels, registry
from nbfftconv.plan import ConvPlan, KernelForm
from nbfftconv.planner import make_plan, make_plan_for_kept, plan_channels_last, planning_state

#: Bytes that kernels leave to free memory.
_RESERVE = 48 * 2**20
#: A layer that would take more than such a part of what is left takes the first of so many times its weight with which
#: it is expected to be so many times slower, at most. Winograd's kernels take two to four times the weight.
_FAIR_SHARES, _MUCH, _SLOWER = (2, 5), 8, 1.1
# Sizes of images whose plan a layer remembers.
_CHOSEN = 512

_kept_lock = fork_safe_lock()  # for moments


_ticks = itertools.count(1)


def tick() -> int:
    """Return the time, in uses of kernels."""
    return next(_ticks)


def keep_call(calls: dict[Any, Any], key: Any, call: Any) -> None:
    """Add to the `KeptKernels.calls` that there were before a call was made."""
    if len(calls) >= _CHOSEN:
        calls.clear()
    calls[key] = call


class Kept:
    """Kernels in one form, their bytes on top of the weight, and the time of their last use, as `tick` counts it."""

    __slots__ = "kernels", "nbytes", "used"

    def __init__(self, kernels: Kernels, nbytes: int) -> None:
        self.kernels, self.nbytes, self.used = kernels, nbytes, tick()


class KeptKernels:
    """A layer's kernels, in the forms that its plans need: transformed, transposed or packed.

    They are kept as far as they fit the bound of `nbfftconv.config.set_memory_limit`. Where they do not, those of any
    layer go that were not used since these were last asked for, the longest unused first: so layers that take turns do
    not drive each other out. Any number of threads may ask at once; of those that need the same new form, each may make
    it.

    Attributes
    ----------
    weight : numpy.ndarray
    forms : dict from KernelForm to Kept
        What is kept.
    calls : dict
        What is ready to be called again, by what it is called with. It holds kernels, and goes when any of them goes.
    """

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight
        self.forms: dict[KernelForm, Kept] = {}
        self.calls: dict[Any, Any] = {}
        # when forms were last asked for
        self._wanted: dict[KernelForm, int] = {}
        # what plans depended on when they were made, and the plan in force
        self._chosen: dict[tuple[ConvGeometry, np.dtype, str, bool], tuple[Any, ConvPlan]] = {}
        memory.add_holder(self)

    def plan(self, geometry: ConvGeometry, dtype: np.dtype, algorithm: str, channels_last: bool = False) -> ConvPlan:
        """Plan a forward pass, for kernels in a form that is kept if that is nearly as fast as the best plan.

        The plan for a size stays, so that its results do, as long as these kernels are kept. With `channels_last`, it
        may be for the geometry with its channels last in memory.
        """
        key, state = (geometry, dtype, algorithm, channels_last), planning_state()
        found = self._chosen.get(key)
        if found is not None and found[0] == state:
            return found[1]
        best = self._best_plan(geometry, dtype, algorithm)
        with _kept_lock:
            found = self._chosen.get(key)  # another thread may have been first
            if found is None or found[0] != state:
                chosen = make_plan_for_kept(best, algorithm, self._wanted.keys())
                if channels_last:
                    chosen = plan_channels_last(chosen, algorithm)
                self._wanted.setdefault(chosen.kernel_form, 0)
                self._chosen[key] = found = state, chosen
                if len(self._chosen) > _CHOSEN:
                    del self._chosen[next(iter(self._chosen))]
        return found[1]

    def _best_plan(self, geometry: ConvGeometry, dtype: np.dtype, algorithm: str) -> ConvPlan:
        """Return the best plan whose kernels find room."""
        best = make_plan(geometry, "forward", dtype, algorithm, weight_is_transformed=True)
        if best.kernel_form in self._wanted:
            return best
        memory.forget_room()  # layers may be gone
        room = memory.room() - _RESERVE
        if room // _MUCH < best.weight_bytes:  # others are to come that need room, too
            shares = (share * self.weight.nbytes for share in _FAIR_SHARES)
            plans = (self._plan_within(s, geometry, dtype, algorithm) for s in shares if s < best.weight_bytes)
            best = next((plan for plan in plans if plan.seconds <= _SLOWER * best.seconds), best)
        if best.weight_bytes <= room:
            return best
        if room < self.weight.nbytes:  # kernels are made anew by every call
            return make_plan(geometry, "forward", dtype, algorithm)
        return self._plan_within(room, geometry, dtype, algorithm)

    @staticmethod
    def _plan_within(nbytes: int, geometry: ConvGeometry, dtype: np.dtype, algorithm: str) -> ConvPlan:
        return make_plan(geometry, "forward", dtype, algorithm, weight_is_transformed=True, weight_limit=nbytes)

    def of(self, plan: ConvPlan) -> Kernels:
        """Return the kernels as `plan` needs them."""
        form, now = plan.kernel_form, tick()
        with _kept_lock:
            since = self._wanted.get(form, 0)
            self._wanted[form] = now
            kept = self.forms.get(form)
        if kept is not None:
            kept.used = now
            return kept.kernels
        weight = compact(self.weight, plan.dtype)
        if weight.shape != plan.geometry.weight_size:  # of sequences or volumes
            weight = weight.reshape(plan.geometry.weight_size)
        kernels = registry.get(plan.algorithm).prepare(plan, weight)
        kept = Kept(kernels, self._bytes_of(kernels))
        with _kept_lock:
            if form in self.forms or _make_room(kept.nbytes, since):
                self.forms.setdefault(form, kept)
                memory.forget_room()
        scratch.trim()
        return kernels

    def _bytes_of(self, kernels: Kernels) -> int:
        arrays = kernels.arrays()
        return sum(array.nbytes for array in arrays if self.weight is not array and self.weight is not array.base)

    def drop(self, form: KernelForm) -> None:
        """Keep a form no longer, nor what holds it."""
        self.forms.pop(form, None)
        self._wanted.pop(form, None)
        self.calls = {}
        self._chosen = {key: each for key, each in self._chosen.items() if each[1].kernel_form != form}

    def forget_calls(self) -> None:
        """Make nothing ready any more: what calls depend on has changed."""
        self.calls = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all forms that are kept, on top of the layer's weight."""
        return sum(kept.nbytes for kept in list(self.forms.values()))


def _make_room(nbytes: int, since: int) -> bool:
    """Let go of kernels that were not used since a time until there is room for so many bytes; tell whether there is.

    If there is not, nothing goes.
    """
    memory.forget_room()  # layers may be gone
    lacking = nbytes - memory.room()
    holders: list[Any] = memory.holders() if lacking > 0 else []
    unused = [
        (kept.used, index, form, kept.nbytes)
        for index, holder in enumerate(holders)
        for form, kept in list(holder.forms.items())
        if kept.used < since
    ]
    if sum(each[-1] for each in unused) < lacking:
        return False
    for _, index, form, freed in sorted(unused, key=operator.itemgetter(0)):
        if lacking <= 0:
            break
        holders[index].drop(form)
        lacking -= freed
    memory.forget_room()
    return True
