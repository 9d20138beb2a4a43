"""The kernels of a layer, kept from call to call in the forms that its plans need, within a bound."""

from typing import Any

import numpy as np

from nbfftconv import scratch
from nbfftconv.arrays import compact
from nbfftconv.forking import fork_safe_lock
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import Kernels, registry
from nbfftconv.plan import ConvPlan, KernelForm
from nbfftconv.planner import make_plan, make_plan_for_kept, planning_state

_DEFAULT_LIMIT = 512 * 2**20
_limit = _DEFAULT_LIMIT
_limit_source = "default"
# Sizes of images whose plan a layer remembers.
_CHOSEN = 512

_kept_lock = fork_safe_lock()  # for moments


def set_kept_limit(nbytes: int) -> None:
    """Bound the memory that each layer keeps of its kernels: of their spectra, and of packed or transposed kernels.

    Parameters
    ----------
    nbytes : int
        At first 512 MiB. The one form of the kernels that a layer used last is kept whatever it takes, so 0 keeps
        nothing else. A layer heeds it when it next needs a form that it has not.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is negative.

    Examples
    --------
    >>> from nbfftconv import config
    >>> before = config.get_kept_limit()
    >>> config.set_kept_limit(2**26)
    >>> config.get_kept_limit()
    67108864
    >>> config.set_kept_limit(before)
    """
    global _limit, _limit_source
    _limit, _limit_source = scratch.check_bytes("the limit of kept kernels", nbytes, 0), "set"


def get_kept_limit() -> int:
    """Return the bound on what each layer keeps of its kernels.

    Returns
    -------
    int
        Bytes, as of `set_kept_limit`.

    Examples
    --------
    >>> from nbfftconv import config
    >>> config.get_kept_limit() >= 0
    True
    """
    return _limit


def kept_limit_source() -> str:
    """Return where the bound comes from: "set" or "default"."""
    return _limit_source


def keep_call(calls: dict[Any, Any], key: Any, call: Any) -> None:
    """Add to the `KeptKernels.calls` that there were before a call was made."""
    if len(calls) >= _CHOSEN:
        calls.clear()
    calls[key] = call


class KeptKernels:
    """A layer's kernels, in the forms that its plans need: transformed, transposed or packed.

    Those that were used last are kept, as far as they fit the bound of `set_kept_limit`. Any number of threads may ask
    at once; of those that need the same new form, each may make it.

    Attributes
    ----------
    weight : numpy.ndarray
    forms : dict from KernelForm to Kernels or None
        Kept, the one that was used last at the end; None if a plan needs it that is about to be run.
    calls : dict
        What is ready to be called again, by what it is called with. It holds kernels, and goes when any of them goes.
    """

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight
        self.forms: dict[KernelForm, Kernels | None] = {}
        self.calls: dict[Any, Any] = {}
        # what plans depended on when they were made, and the plan in force
        self._chosen: dict[tuple[ConvGeometry, np.dtype, str], tuple[Any, ConvPlan]] = {}

    def plan(self, geometry: ConvGeometry, dtype: np.dtype, algorithm: str) -> ConvPlan:
        """Plan a forward pass, for kernels in a form that is kept if that is nearly as fast as the best plan.

        The plan for a size stays, so that its results do, as long as these kernels are kept.
        """
        key, state = (geometry, dtype, algorithm), planning_state()
        found = self._chosen.get(key)
        if found is not None and found[0] == state:
            return found[1]
        best = make_plan(geometry, "forward", dtype, algorithm, weight_is_transformed=True)
        with _kept_lock:
            found = self._chosen.get(key)  # another thread may have been first
            if found is None or found[0] != state:
                chosen = make_plan_for_kept(best, algorithm, self.forms.keys())
                self.forms.setdefault(chosen.kernel_form, None)
                self._chosen[key] = found = state, chosen
                if len(self._chosen) > _CHOSEN:
                    del self._chosen[next(iter(self._chosen))]
        return found[1]

    def of(self, plan: ConvPlan) -> Kernels:
        """Return the kernels as `plan` needs them."""
        form, dropped = plan.kernel_form, {}
        with _kept_lock:
            kernels = self.forms.pop(form, None)
            self.forms[form] = kernels
        if kernels is not None:
            return kernels
        weight = compact(self.weight, plan.dtype)
        if weight.shape != plan.geometry.weight_size:  # of sequences or volumes
            weight = weight.reshape(plan.geometry.weight_size)
        kernels = registry.get(plan.algorithm).prepare(plan, weight)
        with _kept_lock:
            kernels = self.forms.pop(form, None) or kernels
            self.forms[form] = kernels
            while len(self.forms) > 1 and self.nbytes > _limit:
                oldest = next(iter(self.forms))
                dropped[oldest] = self.forms.pop(oldest)
            if dropped:
                self.forget_calls()
                self._chosen = {key: each for key, each in self._chosen.items() if each[1].kernel_form in self.forms}
        return kernels

    def forget_calls(self) -> None:
        """Make nothing ready any more: what calls depend on has changed."""
        self.calls = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all forms that are kept, on top of the layer's weight."""
        arrays = (array for kernels in list(self.forms.values()) if kernels is not None for array in kernels.arrays())
        return sum(array.nbytes for array in arrays if self.weight is not array and self.weight is not array.base)
