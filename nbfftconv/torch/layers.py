"""Layers: subclasses of PyTorch's, with its constructors, attributes and state, whose passes are those of this package.

The weight is the layer's parameter, as ever. What is made of it is kept beside it until it changes, the layer is set to
train, or nobody refers to it any more; it is in no pickle and no copy.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from nbfftconv.torch import functional
from nbfftconv.torch.kept_weights import forget

_Layer = TypeVar("_Layer", bound="_Forgetting")


class _Forgetting(torch.nn.Module):
    """A layer that keeps nothing of its weight once it is to train."""

    def train(self: _Layer, mode: bool = True) -> _Layer:
        """Set the mode, as `torch.nn.Module.train` does; for training, drop what is kept of the kernels."""
        if mode:
            forget(self.weight)  # type: ignore[arg-type]
        return super().train(mode)


class _Convolving(_Forgetting):
    """What layers of convolutions have in common.

    Attributes
    ----------
    clips : bool
        Whether results are clipped at zero, as by a ReLU that follows.
    """

    clips = False

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        layer: Any = self
        axes, padding = weight.dim() - 2, layer.padding
        if layer.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        numbers = layer.stride, padding, layer.dilation, layer.groups
        return functional.convolve(axes, input, weight, bias, *numbers, self.clips)


def _convolve_transposed(layer: Any, axes: int, input: torch.Tensor, output_size: Sequence[int] | None) -> Any:
    if layer.padding_mode != "zeros":
        raise ValueError(f"Only `zeros` padding mode is supported for {type(layer).__name__}")
    shape = layer.stride, layer.padding, layer.kernel_size, axes, layer.dilation
    added = layer._output_padding(input, output_size, *shape)
    numbers = layer.stride, layer.padding, added, layer.groups, layer.dilation
    return getattr(functional, f"conv_transpose{axes}d")(input, layer.weight, layer.bias, *numbers)


class Conv1d(_Convolving, torch.nn.Conv1d):
    """`torch.nn.Conv1d`, computed by `nbfftconv.torch.conv1d`.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.Conv1d`.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> layer = nt.Conv1d(3, 8, 5, padding=2)
    >>> layer(torch.ones(2, 3, *[9] * 1)).shape
    torch.Size([2, 8, 9])
    """


class Conv2d(_Convolving, torch.nn.Conv2d):
    """`torch.nn.Conv2d`, computed by `nbfftconv.torch.conv2d`.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.Conv2d`.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> layer = nt.Conv2d(3, 8, 5, padding=2)
    >>> layer(torch.ones(2, 3, *[9] * 2)).shape
    torch.Size([2, 8, 9, 9])
    """


class Conv3d(_Convolving, torch.nn.Conv3d):
    """`torch.nn.Conv3d`, computed by `nbfftconv.torch.conv3d`.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.Conv3d`.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> layer = nt.Conv3d(3, 8, 5, padding=2)
    >>> layer(torch.ones(2, 3, *[9] * 3)).shape
    torch.Size([2, 8, 9, 9, 9])
    """


class ConvTranspose1d(_Forgetting, torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d`, computed by `nbfftconv.torch.conv_transpose1d`.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.ConvTranspose1d`.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> layer = nt.ConvTranspose1d(8, 3, 2, stride=2)
    >>> layer(torch.ones(2, 8, *[4] * 1)).shape
    torch.Size([2, 3, 8])
    """

    def forward(self, input: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """Convolve the input, transposed; as `torch.nn.ConvTranspose1d` does."""
        return _convolve_transposed(self, 1, input, output_size)


class ConvTranspose2d(_Forgetting, torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`, computed by `nbfftconv.torch.conv_transpose2d`.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.ConvTranspose2d`.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> layer = nt.ConvTranspose2d(8, 3, 2, stride=2)
    >>> layer(torch.ones(2, 8, *[4] * 2)).shape
    torch.Size([2, 3, 8, 8])
    """

    def forward(self, input: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """Convolve the input, transposed; as `torch.nn.ConvTranspose2d` does."""
        return _convolve_transposed(self, 2, input, output_size)


class ConvTranspose3d(_Forgetting, torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`, computed by `nbfftconv.torch.conv_transpose3d`.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.ConvTranspose3d`.

    Examples
    --------
    >>> import torch
    >>> import nbfftconv.torch as nt
    >>> layer = nt.ConvTranspose3d(8, 3, 2, stride=2)
    >>> layer(torch.ones(2, 8, *[4] * 3)).shape
    torch.Size([2, 3, 8, 8, 8])
    """

    def forward(self, input: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """Convolve the input, transposed; as `torch.nn.ConvTranspose3d` does."""
        return _convolve_transposed(self, 3, input, output_size)


class LeftReLU(torch.nn.ReLU):
    """A ReLU that is left to the convolution before it, which clips its results: it does nothing."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return input


#: PyTorch's layers, and ours in their places.
COUNTERPARTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Conv1d: Conv1d,
    torch.nn.Conv2d: Conv2d,
    torch.nn.Conv3d: Conv3d,
    torch.nn.ConvTranspose1d: ConvTranspose1d,
    torch.nn.ConvTranspose2d: ConvTranspose2d,
    torch.nn.ConvTranspose3d: ConvTranspose3d,
}

#: The other way round.
HOSTS = {ours: theirs for theirs, ours in COUNTERPARTS.items()}
