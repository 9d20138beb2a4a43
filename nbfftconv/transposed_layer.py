"""ConvTranspose1d, ConvTranspose2d: layers of transposed convolutions. What all layers have is in layer.py."""

import functools
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbfftconv.arguments import as_batch, as_given, size_of
from nbfftconv.arrays import as_float, check_shape, compact, result_type
from nbfftconv.geometry import Numbers, Padding, TransposedGeometry, transposed_numbers
from nbfftconv.layer import Layer, Setting, masked, passed_by_relu, with_the_others
from nbfftconv.planner import make_plan
from nbfftconv.run import run_forward, run_grad_weight
from nbfftconv.transposed import gradient_of_convolution, run_transposed

# Of shapes of arrays and numbers that `nbfftconv.geometry.unchanging` has returned.
_geometry = functools.lru_cache(maxsize=256)(TransposedGeometry.from_arguments)


class ConvTransposeLayer(Layer):
    """What layers of transposed convolutions have in common."""

    _names = "stride", "padding", "output_padding", "groups", "dilation"
    _modes = "activation", "training", "channels_last"

    stride = Setting(with_the_others)
    padding = Setting(with_the_others)
    output_padding = Setting(with_the_others)
    groups = Setting(with_the_others)
    dilation = Setting(with_the_others)

    # With which the first weight is checked, and then each of them as it is set.
    _stride, _padding, _output_padding, _groups, _dilation = 1, 0, 0, 1, 1

    def __init__(
        self,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        stride: Numbers = 1,
        padding: Padding = 0,
        output_padding: Numbers = 0,
        groups: int = 1,
        dilation: Numbers = 1,
        *,
        activation: str | None = None,
        training: bool = True,
        channels_last: bool = False,
    ) -> None:
        self.activation, self.training, self.channels_last = activation, training, channels_last
        # groups before the bias, whose size depends on it; stride and dilation before what is to be smaller
        numbers = {"padding": padding, "output_padding": output_padding, "groups": groups}
        self._begin(weight, None, stride=stride, dilation=dilation, **numbers)
        self.bias = bias

    def _check_numbers(self, weight_size: tuple[int, ...], **numbers: Any) -> None:
        transposed_numbers(weight_size, **numbers, axes=self._axes)
        filters = weight_size[1] * numbers["groups"]
        if self._bias is not None and len(self._bias) != filters:
            raise ValueError(
                f"weight {weight_size} with groups={numbers['groups']} has {filters} out channels, but the layer's "
                f"bias has {len(self._bias)}; set bias to None first"
            )

    def _out_channels(self, weight_size: tuple[int, ...]) -> int:
        return weight_size[1] * self._groups

    def __call__(self, input: ArrayLike) -> np.ndarray:
        """Convolve images, or sequences, with the layer's kernels, transposed.

        Parameters
        ----------
        input : array_like, shape (batch, channels, height, width) or (batch, channels, length)
            With or without the batch, of float32 or float64. Kept for `backward` while `training`; do not change it in
            between.

        Returns
        -------
        numpy.ndarray, shape (batch, out channels, out height, out width) or (batch, out channels, out length)
            Without the batch if the input has none. Of the dtype to which NumPy promotes those of input, weight and
            bias.

        Raises
        ------
        TypeError
            If the input is neither float32 nor float64, or masked.
        ValueError
            If it has not the layer's dimensions, or not its channels, or the output would be empty.

        Examples
        --------
        >>> import numpy as np
        >>> import nbfftconv
        >>> layer = nbfftconv.ConvTranspose2d(np.ones((4, 3, 2, 2), np.float32), stride=2, training=False)
        >>> layer(np.ones((2, 4, 5, 6), np.float32)).shape
        (2, 3, 10, 12)
        """
        is_last = self._channels_last
        x, is_batch = as_batch("input", input, self._axes, is_last)
        bias, kernels, activation, training = self._bias, self._kernels, self._activation, self.training
        geometry = _geometry(x.shape, kernels.weight.shape, **self._geometry_numbers(), axes=self._axes)
        dtype = result_type(x, kernels.weight) if bias is None else result_type(x, kernels.weight, bias)
        self._last.forward = None  # before there is more to keep
        plan = make_plan(geometry.convolution.of_images, "grad_input", dtype, weight_is_transformed=not training)
        result = run_transposed(geometry, plan, kernels.of(plan), compact(x, dtype), bias, activation)
        if training:
            passed = passed_by_relu(result) if activation == "relu" else None
            self._last.forward = geometry, dtype, x, passed, kernels, bias is not None, is_batch, is_last
        return as_given(result, is_batch, is_last)

    def backward(self, grad_output: ArrayLike) -> np.ndarray:
        """Set `weight_grad` and `bias_grad`, at the last input, and return the gradient of the input.

        Weight, bias, geometry and activation are those of the forward pass, whatever was set since.

        Parameters
        ----------
        grad_output : array_like, of the shape of the last output
            Gradient of the loss with respect to what the forward pass returned; float32 or float64.

        Returns
        -------
        numpy.ndarray, of the shape of the last input
            Of the dtype to which NumPy promotes those of the forward pass and of `grad_output`; so are `weight_grad`
            and `bias_grad`.

        Raises
        ------
        RuntimeError
            If this thread made no forward pass while `training`.
        TypeError
            If `grad_output` is neither float32 nor float64, or masked.
        ValueError
            If `grad_output` has not the shape of the output.

        Examples
        --------
        >>> import numpy as np
        >>> import nbfftconv
        >>> layer = nbfftconv.ConvTranspose2d(np.ones((4, 3, 2, 2), np.float32), stride=2)
        >>> layer.backward(np.ones_like(layer(np.ones((2, 4, 5, 6), np.float32)))).shape
        (2, 4, 5, 6)
        """
        last = getattr(self._last, "forward", None)
        if last is None:
            raise RuntimeError("backward needs a forward pass of the same thread, made with training = True")
        geometry, dtype, x, passed, kernels, has_bias, is_batch, is_last = last
        g = as_float("grad_output", grad_output)
        check_shape("grad_output", g, size_of(geometry.output_size, is_batch, is_last), "the last forward pass")
        g, _ = as_batch("grad_output", g, self._axes, is_last)
        dtype = np.promote_types(dtype, result_type(g))
        g = compact(g, dtype).reshape(geometry.output_size)
        if passed is not None:
            g = masked(g, passed)
        with np.errstate(all="ignore"):  # inf - inf is NaN
            self.bias_grad = g.sum(axis=(0, *range(2, g.ndim))) if has_bias else None
        of_images = geometry.convolution.of_images
        g = compact(gradient_of_convolution(geometry, g), dtype).reshape(of_images.input_shape)
        plan = make_plan(of_images, "forward", dtype)
        grad_input, _ = run_forward(plan, g, kernels.of(plan), None, "zeros", None)
        grad_weight = run_grad_weight(
            make_plan(of_images, "grad_weight", dtype), g, x.reshape(of_images.output_shape), "zeros"
        )
        self.weight_grad = grad_weight.reshape(geometry.convolution.weight_size)
        return as_given(grad_input.reshape(geometry.convolution.output_size), is_batch, is_last)


class ConvTranspose1d(ConvTransposeLayer):
    """A transposed convolution layer of sequences, for training and for inference.

    ``layer(x)`` is the forward pass; ``layer.backward(grad_output)`` the gradients at the input that this thread
    passed last.

    Parameters
    ----------
    weight : array_like, shape (channels, out channels / groups, kernel length)
        Kernels of float32 or float64; copied.
    bias : array_like, shape (out channels,), optional
        Copied. Numbers in a list or a tuple take the dtype of the weight, whatever they are.
    stride : int or tuple of int, default 1
        As in `nbfftconv.conv_transpose1d`.
    padding : int or tuple, default 0
        As in `nbfftconv.conv_transpose1d`.
    output_padding : int or tuple of int, default 0
        As in `nbfftconv.conv_transpose1d`.
    groups : int, default 1
        As in `nbfftconv.conv_transpose1d`.
    dilation : int or tuple of int, default 1
        As in `nbfftconv.conv_transpose1d`.
    activation : {None, "relu"}, default None
        As in `nbfftconv.conv2d`.
    training : bool, default True
        If False, a forward pass keeps nothing for `backward`. `train` and `eval` set it, too.
    channels_last : bool, default False
        As in `nbfftconv.conv2d`: whether channels are the last dimension of what goes in and comes out.

    Attributes
    ----------
    weight : numpy.ndarray
        Kernels, read-only. Assign a new array to change them; set a bias of another size to None first.
    bias : numpy.ndarray or None
        Bias, read-only. Assign a new array, or None, to change it.
    stride, padding, output_padding, groups, dilation : int or tuple
        As above, as they were set. They may be set at any time, and are checked then, with the weight and one another;
        they hold for forward passes to come.
    activation : str or None
        As above. It may be set at any time, and holds for forward passes to come.
    training, channels_last : bool
        As above. They may be set at any time, and hold for forward passes to come.
    weight_grad : numpy.ndarray or None
        Gradient with respect to the weight, of the last `backward`; None before.
    bias_grad : numpy.ndarray or None
        Gradient with respect to the bias, of the last `backward`; None before, and without a bias.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or masked, a number is no integer, or `training` no bool; also
        when it is set later.
    ValueError
        If shapes do not match, a number is out of range, or a name is unknown; also when it is set later.

    Notes
    -----
    Threads, pickles and copies are as with `nbfftconv.Conv2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> layer = nbfftconv.ConvTranspose1d(np.ones((4, 3, 2), np.float32), bias=np.zeros(3, np.float32), stride=2)
    >>> x = np.ones((2, 4, 5), np.float32)
    >>> y = layer(x)
    >>> y.shape
    (2, 3, 10)
    >>> dx = layer.backward(np.ones_like(y))
    >>> dx.shape, layer.weight_grad.shape, layer.bias_grad
    ((2, 4, 5), (4, 3, 2), array([20., 20., 20.], dtype=float32))
    """

    _axes = 1


class ConvTranspose2d(ConvTransposeLayer):
    """A transposed convolution layer of images, for training and for inference.

    ``layer(x)`` is the forward pass; ``layer.backward(grad_output)`` the gradients at the input that this thread
    passed last.

    Parameters
    ----------
    weight : array_like, shape (channels, out channels / groups, kernel height, kernel width)
        Kernels of float32 or float64; copied.
    bias : array_like, shape (out channels,), optional
        Copied. Numbers in a list or a tuple take the dtype of the weight, whatever they are.
    stride : int or tuple of int, default 1
        As in `nbfftconv.conv_transpose2d`.
    padding : int or tuple, default 0
        As in `nbfftconv.conv_transpose2d`.
    output_padding : int or tuple of int, default 0
        As in `nbfftconv.conv_transpose2d`.
    groups : int, default 1
        As in `nbfftconv.conv_transpose2d`.
    dilation : int or tuple of int, default 1
        As in `nbfftconv.conv_transpose2d`.
    activation : {None, "relu"}, default None
        As in `nbfftconv.conv2d`.
    training : bool, default True
        If False, a forward pass keeps nothing for `backward`. `train` and `eval` set it, too.
    channels_last : bool, default False
        As in `nbfftconv.conv2d`: whether channels are the last dimension of what goes in and comes out.

    Attributes
    ----------
    weight : numpy.ndarray
        Kernels, read-only. Assign a new array to change them; set a bias of another size to None first.
    bias : numpy.ndarray or None
        Bias, read-only. Assign a new array, or None, to change it.
    stride, padding, output_padding, groups, dilation : int or tuple
        As above, as they were set. They may be set at any time, and are checked then, with the weight and one another;
        they hold for forward passes to come.
    activation : str or None
        As above. It may be set at any time, and holds for forward passes to come.
    training, channels_last : bool
        As above. They may be set at any time, and hold for forward passes to come.
    weight_grad : numpy.ndarray or None
        Gradient with respect to the weight, of the last `backward`; None before.
    bias_grad : numpy.ndarray or None
        Gradient with respect to the bias, of the last `backward`; None before, and without a bias.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or masked, a number is no integer, or `training` no bool; also
        when it is set later.
    ValueError
        If shapes do not match, a number is out of range, or a name is unknown; also when it is set later.

    Notes
    -----
    Threads, pickles and copies are as with `nbfftconv.Conv2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> layer = nbfftconv.ConvTranspose2d(np.ones((4, 3, 2, 2), np.float32), bias=np.zeros(3, np.float32), stride=2)
    >>> x = np.ones((2, 4, 5, 6), np.float32)
    >>> y = layer(x)
    >>> y.shape
    (2, 3, 10, 12)
    >>> dx = layer.backward(np.ones_like(y))
    >>> dx.shape, layer.weight_grad.shape, layer.bias_grad
    ((2, 4, 5, 6), (4, 3, 2, 2), array([240., 240., 240.], dtype=float32))
    """

    _axes = 2


class ConvTranspose3d(ConvTransposeLayer):
    """A transposed convolution layer of volumes, for training and for inference.

    ``layer(x)`` is the forward pass; ``layer.backward(grad_output)`` the gradients at the input that this thread
    passed last.

    Parameters
    ----------
    weight : array_like, shape (channels, out channels / groups, kernel depth, kernel height, kernel width)
        Kernels of float32 or float64; copied.
    bias : array_like, shape (out channels,), optional
        Copied. Numbers in a list or a tuple take the dtype of the weight, whatever they are.
    stride : int or tuple of int, default 1
        As in `nbfftconv.conv_transpose3d`.
    padding : int or tuple, default 0
        As in `nbfftconv.conv_transpose3d`.
    output_padding : int or tuple of int, default 0
        As in `nbfftconv.conv_transpose3d`.
    groups : int, default 1
        As in `nbfftconv.conv_transpose3d`.
    dilation : int or tuple of int, default 1
        As in `nbfftconv.conv_transpose3d`.
    activation : {None, "relu"}, default None
        As in `nbfftconv.conv2d`.
    training : bool, default True
        If False, a forward pass keeps nothing for `backward`. `train` and `eval` set it, too.
    channels_last : bool, default False
        As in `nbfftconv.conv2d`: whether channels are the last dimension of what goes in and comes out.

    Attributes
    ----------
    weight : numpy.ndarray
        Kernels, read-only. Assign a new array to change them; set a bias of another size to None first.
    bias : numpy.ndarray or None
        Bias, read-only. Assign a new array, or None, to change it.
    stride, padding, output_padding, groups, dilation : int or tuple
        As above, as they were set. They may be set at any time, and are checked then, with the weight and one another;
        they hold for forward passes to come.
    activation : str or None
        As above. It may be set at any time, and holds for forward passes to come.
    training, channels_last : bool
        As above. They may be set at any time, and hold for forward passes to come.
    weight_grad : numpy.ndarray or None
        Gradient with respect to the weight, of the last `backward`; None before.
    bias_grad : numpy.ndarray or None
        Gradient with respect to the bias, of the last `backward`; None before, and without a bias.

    Raises
    ------
    TypeError
        If an array is neither float32 nor float64, or masked, a number is no integer, or `training` no bool; also
        when it is set later.
    ValueError
        If shapes do not match, a number is out of range, or a name is unknown; also when it is set later.

    Notes
    -----
    Threads, pickles and copies are as with `nbfftconv.Conv2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import nbfftconv
    >>> layer = nbfftconv.ConvTranspose3d(np.ones((4, 3, 2, 2, 2), np.float32), bias=np.zeros(3, np.float32), stride=2)
    >>> x = np.ones((2, 4, 5, 6, 7), np.float32)
    >>> y = layer(x)
    >>> y.shape
    (2, 3, 10, 12, 14)
    >>> dx = layer.backward(np.ones_like(y))
    >>> dx.shape, layer.weight_grad.shape, layer.bias_grad
    ((2, 4, 5, 6, 7), (4, 3, 2, 2, 2), array([3360., 3360., 3360.], dtype=float32))
    """

    _axes = 3
