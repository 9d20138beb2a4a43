"""Random convolution geometries for hypothesis, and what a test does with one: operands, plan, run, oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import oracle
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

import nbfftconv
from nbfftconv import layer
from nbfftconv.geometry import ConvGeometry, TransposedGeometry
from nbfftconv.passes.plan import TiledPlan
from nbfftconv.plan import ConvPlan, StepPlan
from nbfftconv.planner import make_plan
from nbfftconv.tiling import problem_sizes
from nbfftconv.transforms import registry

DIRECTIONS = ("forward", "grad_weight", "grad_input")
# Directions, and whether a gradient at the input is run as a forward pass, where it can be.
WAYS = (("forward", None), ("grad_weight", None), ("grad_input", False), ("grad_input", True))
ALGORITHMS = ("auto", "fft", "winograd", "direct")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
MAX_SIZE = 70
MAX_KERNEL = 31
MAX_PRODUCTS = 10_000_000  # that one pass of the oracle may form


def planned(
    geometry: ConvGeometry, direction: str, dtype: Any, algorithm: str = "auto", transposes: bool = True, **choices: Any
) -> ConvPlan:
    """The plan of a geometry; choices are options of the implementation."""
    return make_plan(geometry, direction, np.dtype(dtype), algorithm, tuple(choices.items()), transposes=transposes)


@dataclass(frozen=True)
class Case:
    """One geometry, and its three passes on operands ``a, b`` in the order of the public function."""

    input_size: tuple[int, int, int, int]
    weight_size: tuple[int, int, int, int]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        return oracle.output_size(self.input_size, self.weight_size, self.stride, self.padding, self.dilation)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def shapes(self, direction: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a pass's two operands, in the order of the public function."""
        return {
            "forward": (self.input_size, self.weight_size),
            "grad_weight": (self.input_size, self.output_size),
            "grad_input": (self.weight_size, self.output_size),
        }[direction]

    def operands(
        self, direction: str, dtype: Any, rng: np.random.Generator, *, positive: bool = False
    ) -> tuple[NDArray, NDArray]:
        a, b = self.shapes(direction)
        if positive:
            return rng.uniform(0.5, 1.5, a).astype(dtype), rng.uniform(0.5, 1.5, b).astype(dtype)
        return rng.standard_normal(a).astype(dtype), rng.standard_normal(b).astype(dtype)

    def plan(
        self,
        direction: str,
        dtype: Any,
        *,
        transposed: bool | None = None,
        fused: bool | None = None,
        block_tiles: int | None = None,
        **choices: Any,
    ) -> Any:
        """A plan; a gradient at the input may be transposed if it can be, or not.

        Forward, it may be fused and cut into blocks as the planner never would.
        """
        if direction == "grad_input" and transposed is not None:
            geometry = ConvGeometry.from_arguments(self.input_size, self.weight_size, **self.options)
            other = geometry.transposed() if transposed else None
            if other is None:
                return planned(geometry, direction, dtype, transposes=False, **choices)
            return planned(other, "forward", dtype, **choices).as_grad_input(geometry)
        plan = nbfftconv.plan_conv2d(
            self.input_size, self.weight_size, **self.options, direction=direction, dtype=dtype, **choices
        )
        if direction == "forward" and fused is not None and isinstance(plan, TiledPlan):
            plan = replace(plan, fused=fused, block_tiles=block_tiles or plan.block_tiles)
        return plan

    def run(self, direction: str, a: NDArray, b: NDArray, plan: Any = None, **keywords: Any) -> NDArray:
        keywords |= {"padding_mode": self.padding_mode, "plan": plan} | self.options
        if direction == "forward":
            return nbfftconv.conv2d(a, b, **keywords)
        if direction == "grad_weight":
            return nbfftconv.conv2d_weight(a, self.weight_size, b, **keywords)
        return nbfftconv.conv2d_input(self.input_size, a, b, **keywords)

    def expect(self, direction: str, a: NDArray, b: NDArray, **keywords: Any) -> NDArray[np.float64]:
        keywords |= {"padding_mode": self.padding_mode} | self.options
        if direction == "forward":
            return oracle.conv2d(a, b, **keywords)
        if direction == "grad_weight":
            return oracle.conv2d_weight(a, self.weight_size, b, **keywords)
        return oracle.conv2d_input(self.input_size, a, b, **keywords)

    def operands_and_expected(
        self, direction: str, dtype: Any, rng: np.random.Generator
    ) -> tuple[NDArray, NDArray, NDArray[np.float64]]:
        """Operands whose result is large enough to measure a relative error by.

        The largest of a handful of sums of normal values may happen to be close to zero; sums of positive
        ones are not.
        """
        a, b = self.operands(direction, dtype, rng)
        expected = self.expect(direction, a, b)
        if np.count_nonzero(expected) < 16:
            a, b = self.operands(direction, dtype, rng, positive=True)
            expected = self.expect(direction, a, b)
        return a, b, expected


@st.composite
def paddings(draw, reach: tuple[int, int], stride: tuple[int, int]) -> Any:
    amounts = [st.integers(0, min(r + 3, 20)) for r in reach]
    forms = [
        st.just("valid"),
        st.just("full"),
        st.integers(0, min(*reach, 20) + 1),
        st.tuples(*amounts),
        st.tuples(*(st.tuples(amount, amount) for amount in amounts)),
    ]
    if stride == (1, 1):
        forms.append(st.just("same"))
    return draw(st.one_of(forms))


@st.composite
def cases(
    draw,
    max_size: int = MAX_SIZE,
    max_kernel: int = MAX_KERNEL,
    max_products: int = MAX_PRODUCTS,
    max_multiplier: int = 6,
) -> Case:
    """Any valid geometry within the bounds; shrinks towards 1x1 images and kernels, stride 1, no padding."""
    padding_mode = draw(st.sampled_from(PADDING_MODES))
    kernel = draw(st.tuples(*[st.integers(1, max_kernel)] * 2))
    dilation = tuple(
        draw(st.integers(1, min(4, (max_size - 1) // (k - 1)))) if k > 1 else draw(st.integers(1, 4)) for k in kernel
    )
    stride = draw(st.one_of(st.just((1, 1)), st.tuples(*[st.integers(1, 4)] * 2)))
    reach = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    padding = draw(paddings(reach, stride))
    size = []
    for r, pads in zip(reach, oracle.resolve_padding(padding, kernel, dilation), strict=True):
        smallest = max(1, r + 1 - sum(pads))
        if padding_mode == "reflect":
            smallest = max(smallest, max(pads) + 1)
        elif padding_mode == "circular":
            smallest = max(smallest, max(pads))
        size.append(draw(st.integers(smallest, max(smallest, max_size))))
    _, _, *out = oracle.output_size((1, 1, *size), (1, 1, *kernel), stride, padding, dilation)
    # batch * out_channels * channels per group, as many as the oracle can bear
    room = max(1, max_products // (kernel[0] * kernel[1] * out[0] * out[1]))
    batch = draw(st.integers(1, min(3, room)))
    groups = draw(st.integers(1, max(1, min(6, room // batch))))
    in_group = draw(st.integers(1, max(1, min(6, room // (batch * groups)))))
    multiplier = draw(st.integers(1, max(1, min(max_multiplier, room // (batch * groups * in_group)))))
    return Case(
        input_size=(batch, groups * in_group, *size),
        weight_size=(groups * multiplier, in_group, *kernel),
        stride=stride[0] if stride[0] == stride[1] and draw(st.booleans()) else stride,
        padding=padding,
        dilation=dilation[0] if dilation[0] == dilation[1] and draw(st.booleans()) else dilation,
        groups=groups,
        padding_mode=padding_mode,
    )


@st.composite
def tiles(draw, case: Case, most: int = 40) -> tuple[int, int]:
    """A tile that the kernel fits into, often with room for few outputs only."""
    return tuple(draw(st.integers(k, k + most)) for k in case.weight_size[2:])


# Pairs of sides that there are codelets for: a few, because each is compiled.
CODELET_TILES = [(8, 8), (12, 16), (20, 20), (24, 32), (32, 32)]


def codelet_tiles(case: Case) -> st.SearchStrategy[tuple[int, int]]:
    """A codelet's tile that the kernel fits into."""
    fitting = [tile for tile in CODELET_TILES if tile[0] >= case.weight_size[2] and tile[1] >= case.weight_size[3]]
    return st.sampled_from(fitting)


# The same for four-step transforms: sides that are no multiple of the lanes, and steps of odd lengths.
FOUR_STEP_TILES = [(30, 40), (36, 30), (40, 72), (72, 36), (90, 40)]


def four_step_tiles(case: Case) -> st.SearchStrategy[tuple[int, int]]:
    """A four-step transform's tile that the kernel fits into."""
    fitting = [tile for tile in FOUR_STEP_TILES if tile[0] >= case.weight_size[2] and tile[1] >= case.weight_size[3]]
    return st.sampled_from(fitting)


#: The same for transforms of rows.
ROW_TILES = {"row_codelet": [(1, 64), (1, 160), (1, 576)], "row_four_step": [(1, 1920), (1, 2304)]}


def is_of_rows(case: Case) -> bool:
    """Whether transforms of rows are for a case: one tap of the kernel is above the other in no phase."""
    geometry = ConvGeometry.from_arguments(case.input_size, case.weight_size, **case.options)
    return problem_sizes(geometry)[0][1] == 1


def of_one_row(case: Case) -> Case:
    """The case with kernels of one row."""
    return replace(case, weight_size=(*case.weight_size[:2], 1, case.weight_size[3]))


#: Kernels that Winograd's maps are for.
FEW_TAPS = 3


def are_few_taps(input_size: Any, weight_size: Any, options: dict[str, Any]) -> bool:
    """Whether Winograd's maps are for a convolution, of any number of axes, or for a transposed one."""
    numbers = {name: value for name, value in options.items() if name != "padding_mode"}
    if "output_padding" in numbers:  # transposed
        geometry = TransposedGeometry.from_arguments(
            input_size, weight_size, **numbers, axes=len(weight_size) - 2
        ).convolution
    else:
        geometry = ConvGeometry.from_arguments(input_size, weight_size, **numbers, axes=len(weight_size) - 2)
    return max(taps for _, taps in problem_sizes(geometry.of_images)) <= FEW_TAPS


def has_few_taps(case: Case) -> bool:
    """Whether Winograd's maps are for a case."""
    return are_few_taps(case.input_size, case.weight_size, case.options)


def skip_unless_possible(input_size: Any, weight_size: Any, options: dict[str, Any], algorithm: str) -> None:
    """Skip a test by Winograd's maps that they are not for."""
    if algorithm == "winograd" and not are_few_taps(input_size, weight_size, options):
        pytest.skip("Winograd's maps are for fewer taps")


@contextmanager
def refused_unless(is_possible: bool) -> Iterator[None]:
    """Expect the error that Winograd's maps are asked for too many taps, unless they are not."""
    with nullcontext() if is_possible else pytest.raises(ValueError, match="3 taps a side at most"):
        yield


def winograd_tiles(case: Case) -> st.SearchStrategy[tuple[int, int]]:
    """A tile of Winograd's maps."""
    geometry = ConvGeometry.from_arguments(case.input_size, case.weight_size, **case.options)
    vertical, horizontal = (taps for _, taps in problem_sizes(geometry))
    return st.tuples(*(st.sampled_from([taps + 1, taps + 3]) for taps in (vertical, horizontal)))


def generators() -> st.SearchStrategy[np.random.Generator]:
    return st.builds(np.random.default_rng, st.integers(0, 2**32 - 1))


def in_blocks(plan: Any, block_tiles: int | None) -> Any:
    """The plan with stages over so many tiles at a time, or over all if these are fewer."""
    block_tiles = plan.block_tiles if block_tiles is None else max(1, min(block_tiles, plan.grid.tiles))
    return replace(plan, fused=False, block_tiles=block_tiles)


@contextmanager
def shared_steps(block_tiles: int | None = None, forward: str | None = None, **choices: Any) -> Iterator[None]:
    """Layers' steps share spectra, of a given transform and tile; kept unless `spectra_limit` is 0.

    With `forward`, gradients alone do, after a forward pass by that algorithm.
    Few tiles to a block, as the planner never has: blocks then begin amid images and rows of tiles.
    """

    def make_step_plan(geometry: ConvGeometry, dtype: np.dtype, algorithm: str, spectra_limit: int) -> StepPlan:
        algorithm = registry.get(choices["transform"]).algorithm if "transform" in choices else "fft"
        plans = [
            planned(geometry, direction, dtype, algorithm, transposes=False, **choices) for direction in DIRECTIONS
        ]
        plans = [in_blocks(plan, block_tiles) for plan in plans]
        if forward is not None:
            plans[0] = planned(geometry, "forward", dtype, forward)
        keeps = forward is None and spectra_limit > 0
        return StepPlan(*plans, seconds=0.0, shares_spectra=True, keeps_input_spectra=keeps)

    with mock.patch.object(layer, "make_step_plan", make_step_plan):
        yield


@st.composite
def tilings(draw, case: Case, most: int = 16) -> dict[str, Any]:
    """A transform, and a tile of it that the kernel fits into."""
    strategies = {"fftw": tiles(case, most), "codelet": codelet_tiles(case), "four_step": four_step_tiles(case)}
    if has_few_taps(case):
        strategies["winograd"] = winograd_tiles(case)
    if is_of_rows(case):
        strategies |= {name: st.sampled_from(of_rows) for name, of_rows in ROW_TILES.items()}
    transform = draw(st.sampled_from(list(strategies)))
    return {"transform": transform, "tile": draw(strategies[transform])}
