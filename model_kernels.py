"""Fast forms, on a CPU, of what model.py states plainly: each is tested equal to its plain form, forward and backward.

An MLP is one node of the graph, its parameters one vector, its gradient another: with a node a layer, overhead would
take as long as the products. What multiplies matrices is decided once a process, by what the processor is and never by
timing, so that a machine gives the same bits every time (`--kernels`):

    torch     PyTorch's own products, by MKL on x86
    onednn    `mkldnn._linear_pointwise`, the private operator of torch.compile: oneDNN. MKL runs its AVX2 code on an
              AVX-512 processor that is not Intel's; oneDNN is twice as fast there. With AVX2 alone, MKL is the faster
    plain     model.py's own forms, differentiated by autograd, as on a GPU

`--precision bf16` has the products between hidden layers in bfloat16, and all else in float32.
"""

from __future__ import annotations

import functools
import logging
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import UserError

logger = logging.getLogger(__name__)

Kernels = Literal["auto", "torch", "onednn", "plain"]
Precision = Literal["float32", "bf16"]
LOG2_E = 1 / math.log(2)


# ---------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------


class _Chosen:
    """What this process multiplies with."""

    kernels: str | None = None  # None until choose_kernels runs
    precision: str = "float32"


@dataclass
class KernelConfig:
    """What every command that trains may be told of its products."""

    kernels: Kernels = (
        "auto"  # matrix library on a CPU: auto (by processor), torch (MKL on x86), onednn, or plain (autograd)
    )
    precision: Precision = "float32"  # precision of hidden layers; bf16 needs a CPU with bfloat16 instructions


def use_kernels(config: KernelConfig, device: torch.device) -> None:
    """`choose_kernels` by a command's settings; UserError where they cannot be met."""
    if config.precision == "bf16" and (device.type != "cpu" or config.kernels == "plain"):
        raise UserError("--precision bf16: for a CPU and its fast kernels alone; use --device cpu, or float32")
    if config.precision == "bf16" and not has_bf16():
        raise UserError("--precision bf16: this processor has no such products, and would take many times as long")
    try:
        choose_kernels(config.kernels, config.precision)
    except ValueError as error:
        raise UserError(f"--kernels {config.kernels}: {error}") from None


def choose_kernels(kernels: Kernels = "auto", precision: Precision = "float32") -> str:
    """Set what this process multiplies with, log it, and return it: torch, onednn or plain.

    Raises:
        ValueError: onednn where this PyTorch lacks the operator or refuses it; a name that is none of these.
    """
    if kernels not in get_args(Kernels) or precision not in get_args(Precision):
        raise ValueError(f"kernels {kernels!r} and precision {precision!r} are not among the choices")
    if kernels == "onednn" and not onednn_works():
        raise ValueError("this PyTorch lacks the operator, or it refuses this processor; use auto or torch")
    chosen = fastest_kernels() if kernels == "auto" else kernels
    if (chosen, precision) != (_Chosen.kernels, _Chosen.precision):
        logger.info("matrix products on a CPU: %s, %s", chosen, precision)
    _Chosen.kernels, _Chosen.precision = chosen, precision
    return chosen


def fastest_kernels() -> str:
    """onednn on an AVX-512 processor that is not Intel's, where its operator works, else torch."""
    is_amd = torch.backends.cpu.get_cpu_capability() == "AVX512" and processor_vendor() != "GenuineIntel"
    return "onednn" if is_amd and onednn_works() else "torch"


@functools.cache
def processor_vendor() -> str:
    """The processor's own name of its maker, as AuthenticAMD; what the platform says where that cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), platform.processor())


@functools.cache
def onednn_works() -> bool:
    """Whether this PyTorch has the private operator, and it gives what a linear layer gives."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
    except (RuntimeError, TypeError):  # another signature, or a processor it does not know
        return False
    return torch.equal(found, torch.full((2, 4), 4.0))


@functools.cache
def cache_bytes() -> int:
    """Size of a core's second-level cache; 512 KiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 512 * 1024


def block_rows(width: int) -> int:
    """Rows at a time, of so many numbers each: a block's values and its slopes then stay in the cache."""
    return max(64, cache_bytes() // (8 * width))


@functools.cache
def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself. Elsewhere PyTorch does it by a loop, a hundred times slower."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported()) and torch.backends.cpu.get_cpu_capability() == "AVX512"


def chosen_kernels() -> str:
    """What this process multiplies with, chosen now if it was not before: torch, onednn or plain."""
    return _Chosen.kernels or choose_kernels()


def kernels_of(x: Tensor) -> str:
    """What multiplies x: plain off the CPU, in half precision and under autocast."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return "plain"
    chosen = chosen_kernels()
    return "torch" if chosen == "onednn" and (x.dtype == torch.float64 or not x.numel()) else chosen


# ---------------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------------


def _differentiable_once(backward: Callable) -> Callable:
    """Refuse a second derivative, which `once_differentiable` takes for zero where no graph leads to the slope."""

    @functools.wraps(backward)
    def refusing(ctx, *slopes):
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("a fast form on a CPU is differentiable once: a second derivative needs kernels plain")
        return backward(ctx, *slopes)

    return refusing


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; x [n, in] and weight [out, in] contiguous or transposed, anything else is very slow.

    Its own relu is not used: it makes 0 of nan, and a run that diverged would not be noticed.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _to_layer(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, first: bool, onednn: bool) -> None:
    """Write (or, where it is not the first, add) x^T grad [in, out] and the sum of grad [out] to slopes of a layer."""
    narrow = 1 < weight.shape[1] < 32  # there the transpose of grad^T x is several times as fast
    if narrow or onednn or x.dtype != weight.dtype:
        product = (_onednn(grad.t(), x.t()) if onednn else torch.mm(grad.t(), x)).t()
        weight.copy_(product) if first else weight.add_(product)
    elif first:
        torch.mm(x.t(), grad, out=weight)
    else:
        weight.addmm_(x.t(), grad)
    torch.sum(grad, 0, out=bias) if first else bias.add_(grad.sum(0))


def _relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    """grad where y is positive, else 0; in place."""
    return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)


class _Linear(torch.autograd.Function):
    """x [n, in] by weight [out, in] and bias [out] or none, by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            _onednn(grad, weight.t()) if to_x else None,
            _onednn(grad.t(), x.t()) if to_weight else None,
            grad.sum(0) if to_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `F.linear` gives: x [..., in], weight [out, in], bias [out] or none -> [..., out]; differentiable once."""
    kernels = kernels_of(x)
    if kernels != "plain" and _Chosen.precision == "bf16":
        return F.linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()).to(x.dtype)
    if kernels != "onednn" or len(weight) == 1:
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


# ---------------------------------------------------------------------------------------------------------------
# MLPs
# ---------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One linear layer of one member, as views of the vector of parameters."""

    weight: Tensor  # [in, out]
    bias: Tensor  # [out]
    transposed: Tensor  # [out, in]
    width: int  # out


class MLPShape(NamedTuple):
    """`size` MLPs of these widths, whose parameters lie in one vector: layer by layer all weights, then all biases."""

    widths: tuple[int, ...]
    size: int

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(in, out) of each."""
        return list(zip(self.widths, self.widths[1:], strict=False))

    def members(self, theta: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
        """Of each member, the weight [in, out] and the bias [out] of each layer, as views of a vector."""
        size, layers = self.size, self.layers
        pieces = theta.split(_counts(self))
        return [
            [(pieces[2 * i * size + k].view(ab), pieces[(2 * i + 1) * size + k]) for i, ab in enumerate(layers)]
            for k in range(size)
        ]


@functools.cache
def _counts(shape: MLPShape) -> list[int]:
    return [n for a, b in shape.layers for n in [a * b] * shape.size + [b] * shape.size]


def as_layers(member: Iterable[tuple[Tensor, Tensor]]) -> list[Layer]:
    """A member's weights and biases with what each product needs of them."""
    return [Layer(weight, bias, weight.t(), weight.shape[1]) for weight, bias in member]


class _MLP(torch.autograd.Function):
    """The first `members` of MLPs: inputs [n, ...], side by side the input of all, or [members, n, in], one of each."""

    @staticmethod
    def forward(ctx, theta, net, members, squash, *inputs):
        """-> [members, n, out]."""
        x = _beside(inputs)
        ctx.net, ctx.squash, ctx.inputs = net, squash, [each.shape[-1] for each in inputs]
        y, saved = _values(net, members, x)
        if squash:
            y.tanh_()
        ctx.save_for_backward(y, theta, x, *saved)
        return y

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        y, _, x, *saved = ctx.saved_tensors
        to_theta, _, _, _, *to_inputs = ctx.needs_input_grad
        if ctx.squash:
            grad = torch.ops.aten.tanh_backward(grad, y)
        begin, end = _wanted_columns(ctx.inputs, to_inputs)
        slopes, to_x = _slopes(ctx.net, x, saved, grad, to_theta, begin, end)
        return slopes, None, None, None, *_by_input(to_x, ctx.inputs, to_inputs)


class _Regression(torch.autograd.Function):
    """Squared error of MLPs of one output, its gradient made in the forward pass."""

    @staticmethod
    def forward(ctx, theta, net, target, expectile, *inputs):
        """-> the error, 0-d, and the outputs [size, n, 1]."""
        x = _beside(inputs)
        if target.shape != x.shape[:1] or target.requires_grad:
            raise ValueError(f"a target {list(target.shape)} of {list(x.shape)} inputs must be [n], without gradient")
        y, saved = _values(net, net.shape.size, x)
        error = y - target.unsqueeze(1)
        if expectile is None:
            slope = error * (2 / len(x))
        else:
            slope = (error > 0).to(error.dtype).sub_(expectile).abs_().mul_(error).mul_(2 / len(x))
        ctx.slopes = _slopes(net, x, saved, slope, True)[0]
        ctx.mark_non_differentiable(y)
        return torch.dot(slope.view(-1), error.view(-1)) / 2, y

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad, _):
        slopes, ctx.slopes = ctx.slopes, None  # handed on, so that it becomes theta's gradient without a copy
        if slopes is None:
            raise RuntimeError("a squared error of a fast form has one backward pass")
        return slopes.mul_(grad), *[None] * (len(ctx.needs_input_grad) - 1)


class _Frozen(torch.autograd.Function):
    """The first `members` of MLPs of one output, with a gradient to the last input alone, made in the forward pass."""

    @staticmethod
    def forward(ctx, net, members, *inputs):
        """-> [members, n, 1]."""
        x = _beside(inputs)
        y, saved = _values(net, members, x)
        rows = x.expand(members, *x.shape)  # so that each member's slope is kept apart
        ctx.save_for_backward(
            _slopes(net, rows, saved, torch.ones_like(y), False, x.shape[1] - inputs[-1].shape[1], x.shape[1])[1]
        )
        return y

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        return *[None] * (len(ctx.needs_input_grad) - 1), (ctx.saved_tensors[0] * grad).sum(0)


def _beside(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)


def _values(net, members: int, x: Tensor, keep: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Outputs [members, n, out] of x [n, in] or [members, n, in], and all hidden values if they are to be kept."""
    if x.dim() == 3 and len(x) != members:
        raise ValueError(f"an input of {len(x)} networks' own rows for {members} networks")
    y, saved = x.new_empty(members, x.shape[-2], net.output_dim), []
    library = _library(x)
    for k, layers in enumerate(net.member_layers()[:members]):
        for rows, out in _blocks(net, k, x, y):
            values = _forward(rows, layers, out, library)
            if keep:
                saved += values
    return y, saved


def _slopes(
    net, x: Tensor, saved: list[Tensor], grad: Tensor, to_theta: bool, begin: int = 0, end: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """From the slope of the outputs [members, n, out] to that of theta, and of columns begin to end of x."""
    members, depth = len(grad), len(net.shape.widths) - 2
    slopes, own, to_x = None, None, None
    if to_theta:
        slopes = torch.empty_like(net.theta, requires_grad=False)
        if members < net.shape.size:
            slopes.zero_()
        own = net.shape.members(slopes)
    if end > begin:
        to_x = x.new_empty(*x.shape[:-1], end - begin)
    library = _library(x)
    tensors = (x, grad) if to_x is None else (x, grad, to_x)
    for k, layers in enumerate(net.member_layers()[:members]):
        for number, (rows, slope, *out) in enumerate(_blocks(net, k, *tensors)):
            values, saved = [rows, *saved[:depth]], saved[depth:]
            slope = _backward(values, slope, layers, own and own[k], number == 0, library)
            if out and (k == 0 or x.dim() == 3):
                torch.mm(slope, layers[0].transposed[:, begin:end], out=out[0])
            elif out:
                out[0].addmm_(slope, layers[0].transposed[:, begin:end])
    return slopes, to_x


def _library(x: Tensor) -> str:
    """What multiplies between hidden layers: torch, onednn, or bf16, whose products PyTorch gives to oneDNN itself."""
    return "bf16" if _Chosen.precision == "bf16" else kernels_of(x)


def _forward(x: Tensor, layers: Sequence[Layer], out: Tensor, library: str) -> list[Tensor]:
    """Write the output of one MLP; returns its hidden values."""
    hidden = []
    for weight, bias, transposed, _ in layers[:-1]:
        if library == "bf16":
            x = torch.addmm(bias.bfloat16(), x.bfloat16(), weight.bfloat16()).relu_()
        else:
            x = (_onednn(x, transposed, bias) if library == "onednn" else torch.addmm(bias, x, weight)).relu_()
        hidden.append(x)
    torch.addmm(layers[-1].bias, x.to(out.dtype), layers[-1].weight, out=out)
    return hidden


def _backward(
    values: Sequence[Tensor],
    grad: Tensor,
    layers: Sequence[Layer],
    into: list[tuple[Tensor, Tensor]] | None,
    first: bool,
    library: str,
) -> Tensor:
    """From the gradient of the output to that behind the first layer, [n, width]; the parameters' go to `into`.

    first: write these, else add to them. In bf16, only the last layer's products are in the parameters' precision.
    """
    half, onednn, precision = library == "bf16", library == "onednn", grad.dtype
    for number in range(len(layers) - 1, 0, -1):
        value, layer = values[number], layers[number]
        if into is not None:
            _to_layer(value.to(grad.dtype), grad, *into[number], first, onednn and layer.width > 1)
        if layer.width == 1:
            grad = grad * layer.transposed
        else:
            grad = _onednn(grad, layer.weight) if onednn else torch.mm(grad, layer.transposed.to(grad.dtype))
        grad = _relu_backward(grad.bfloat16() if half else grad, value)
    if into is not None:
        _to_layer(values[0].to(grad.dtype), grad, *into[0], first, onednn)
    return grad.to(precision)


def _blocks(net, k: int, *tensors: Tensor) -> Iterable[Sequence[Tensor]]:
    """Blocks of rows, for member k: of tensors [n, ...], which are the same for all, and [members, n, ...]."""
    own = [each if each.dim() == 2 else each[k] for each in tensors]
    if len(own[0]) <= net.rows:
        return (own,)
    return zip(*(each.split(net.rows) for each in own), strict=True)


def _wanted_columns(widths: Sequence[int], wanted: Sequence[bool]) -> tuple[int, int]:
    """First and last column of those inputs that want a gradient."""
    columns = [(sum(widths[:i]), sum(widths[: i + 1])) for i, want in enumerate(wanted) if want]
    return (columns[0][0], columns[-1][1]) if columns else (0, 0)


def _by_input(to_x: Tensor | None, widths: Sequence[int], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of each input that wants one."""
    if to_x is None:
        return [None] * len(widths)
    begin, _ = _wanted_columns(widths, wanted)
    offsets = [sum(widths[:i]) - begin for i in range(len(widths))]
    return [
        to_x[..., offset : offset + width] if want else None
        for offset, width, want in zip(offsets, widths, wanted, strict=True)
    ]


def run_mlp(net, theta: Tensor, members: int, inputs: Sequence[Tensor], squash: bool = False) -> Tensor:
    """The first `members` of a `model.MLP`, as one node of the graph; differentiable once.

    Args:
        net: the network. theta: its parameters, or those detached. squash: tanh of the output.
        inputs: [n, ...], side by side the input of every member; or one of [members, n, in], each member's own.

    Returns:
        [members, n, out].
    """
    if torch.is_grad_enabled():
        return _MLP.apply(theta, net, members, squash, *inputs)
    y, _ = _values(net, members, _beside(inputs), keep=False)
    return y.tanh_() if squash else y


def run_regression(net, inputs: Sequence[Tensor], target: Tensor, expectile: float | None) -> tuple[Tensor, Tensor]:
    """Squared error of a `model.MLP` of one output to target [n]: mean over rows, sum over networks, 0-d; its outputs.

    With an expectile, errors of outputs above the target weigh 1 - expectile, and others expectile. The error is
    differentiable by the parameters, the outputs [size, n, 1] are not.
    """
    return _Regression.apply(net.theta, net, target, expectile, *inputs)


def run_frozen(net, members: int, inputs: Sequence[Tensor]) -> Tensor:
    """The first `members` of a `model.MLP` of one output, [members, n, 1], differentiable by its last input alone."""
    if not torch.is_grad_enabled() or not inputs[-1].requires_grad:
        return _values(net, members, _beside(inputs), keep=False)[0]
    return _Frozen.apply(net, members, *inputs)


class _MLPWithGradients(torch.autograd.Function):
    """Outputs q of MLPs and their gradients g by the last columns of their input, both differentiable by the weights.

    With h_l = relu(h_{l-1} W_l + b_l), q = h_L w + c and m_l where h_l is positive:

        u_L = w^T m_L        u_{l-1} = (u_l W_l^T) m_{l-1}        g = u_1 W_1^T, the last columns of W_1^T alone

    Each of these products is differentiated like a layer; the masks are constants.
    """

    @staticmethod
    def forward(ctx, theta, net, columns, *inputs):
        """-> q [size, n, 1], g [size, n, columns]."""
        x, size = torch.cat(inputs, -1), net.shape.size
        ctx.net, ctx.columns, ctx.library = net, columns, kernels_of(x)
        onednn = ctx.library == "onednn"
        q, g, saved = x.new_empty(size, len(x), 1), x.new_empty(size, len(x), columns), []
        for k, layers in enumerate(net.member_layers()):
            values = _forward(x, layers, q[k], ctx.library)
            last = layers[-1].transposed.expand_as(values[-1])
            slopes = [torch.ops.aten.threshold_backward(last, values[-1], 0)]
            for layer, value in zip(layers[-2:0:-1], values[-2::-1], strict=True):
                slope = _onednn(slopes[-1], layer.weight) if onednn else torch.mm(slopes[-1], layer.transposed)
                slopes.append(_relu_backward(slope, value))
            torch.mm(slopes[-1], layers[0].transposed[:, -columns:], out=g[k])
            saved += values + slopes
        ctx.save_for_backward(theta, x, *saved)
        return q, g

    @staticmethod
    @_differentiable_once
    def backward(ctx, d_q, d_g):
        (theta, x, *saved), net, onednn = ctx.saved_tensors, ctx.net, ctx.library == "onednn"
        depth, d_theta = len(net.shape.widths) - 2, torch.empty_like(theta)
        for k, (layers, into) in enumerate(zip(net.member_layers(), net.shape.members(d_theta), strict=True)):
            own, saved = saved[: 2 * depth], saved[2 * depth :]
            values, slopes = own[:depth], own[depth:][::-1]  # slopes[l] is u_{l+1}
            _backward([x, *values], d_q[k], layers, into, True, ctx.library)
            into[0][0][-ctx.columns :].addmm_(d_g[k].t(), slopes[0])
            d_slope = _relu_backward(torch.mm(d_g[k], layers[0].weight[-ctx.columns :]), values[0])
            for layer, (weight, _), value, slope in zip(layers[1:-1], into[1:-1], values[1:], slopes[1:], strict=True):
                if onednn:
                    weight.add_(_onednn(d_slope.t(), slope.t()))
                else:
                    weight.addmm_(d_slope.t(), slope)
                d_slope = _onednn(d_slope, layer.transposed) if onednn else torch.mm(d_slope, layer.weight)
                d_slope = _relu_backward(d_slope, value)
            into[-1][0].add_(d_slope.sum(0).unsqueeze(1))
        return d_theta, None, None, *[None] * len(ctx.needs_input_grad[3:])


def run_mlp_with_gradients(net, inputs: Sequence[Tensor], columns: int) -> tuple[Tensor, Tensor]:
    """Outputs [size, n, 1] of a `model.MLP` and their gradients by its input's last columns [size, n, columns].

    Both are differentiable, once, by the parameters; not by the inputs [n, ...], which lie side by side.
    """
    return _MLPWithGradients.apply(net.theta, net, columns, *inputs)


# ---------------------------------------------------------------------------------------------------------------
# The Mamba-2 block, on a GPU too: these forms save passes over memory
# ---------------------------------------------------------------------------------------------------------------


class _DualForm(torch.autograd.Function):
    """y = P (dt x) with P = (C B^T) * decay, decay[t, s] = exp(total_t - total_s) for s <= t, else 0.

    Written by hand because autograd would pass over the [b, h, l, l] decay five more times. The derivative by
    `total` needs none of them: with E = dP * P, the row sums of E are <dy_t, y_t> and its column sums
    <u_s, du_s>, where u = dt x.
    """

    @staticmethod
    def forward(ctx, C, B, total, dt, x):
        length = total.shape[-1]
        # The mask goes in before the exponential: above the diagonal the sum is positive and would overflow.
        above = torch.full((length, length), -torch.inf, dtype=total.dtype, device=total.device).triu_(1)
        # Powers of two: on a CPU torch.exp can be many times slower where it underflows, and far positions do.
        powers = total * LOG2_E
        decay = (powers.unsqueeze(-1) - powers.unsqueeze(-2)).add_(above).exp2_()
        P = decay * torch.bmm(C, B.transpose(1, 2)).unsqueeze(1)
        u = torch.mul(dt.unsqueeze(-1), x, out=x.new_empty(x.shape))  # contiguous, so the products below copy nothing
        y = P @ u
        ctx.save_for_backward(C, B, dt, x, u, decay, P, y)
        return y

    @staticmethod
    @_differentiable_once
    def backward(ctx, dy):
        C, B, dt, x, u, decay, P, y = ctx.saved_tensors
        dy = dy.contiguous()
        du = P.transpose(2, 3) @ dy
        d_scores = (dy @ u.transpose(2, 3)).mul_(decay).sum(1)  # [b, l, l], summed over the heads
        products = dy * y  # one buffer for the three: fresh memory costs more than the arithmetic
        d_total = products.sum(-1)
        d_total -= torch.mul(u, du, out=products).sum(-1)
        d_dt = torch.mul(x, du, out=products).sum(-1)
        d_x = torch.mul(dt.unsqueeze(-1), du, out=du)
        return torch.bmm(d_scores, B), torch.bmm(d_scores.transpose(1, 2), C), d_total, d_dt, d_x


def run_dual_form(C: Tensor, B: Tensor, total: Tensor, dt: Tensor, x: Tensor) -> Tensor:
    """What `model.dual_form` states; differentiable once."""
    return _DualForm.apply(C, B, total, dt, x)


class _CausalConvSiLU(torch.autograd.Function):
    """silu of a depthwise causal convolution, as shifted multiply-adds.

    Channels stay last, so there is no transpose, and on a CPU it takes a third of the time of a grouped `conv1d`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        taps = weight.squeeze(1).t().contiguous()  # [width, channels]; the last tap looks at the present
        width, length = taps.shape[0], x.shape[1]
        y = torch.addcmul(bias, x, taps[-1])
        for k in range(1, min(width, length)):
            y[:, k:].addcmul_(x[:, : length - k], taps[-1 - k])
        ctx.save_for_backward(x, taps, y)
        return F.silu(y)

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        x, taps, y = ctx.saved_tensors
        width, length = taps.shape[0], x.shape[1]
        grad = torch.ops.aten.silu_backward(grad.contiguous(), y)
        d_taps = torch.zeros_like(taps)
        products = grad * x
        d_taps[-1] = products.sum((0, 1))
        d_x = grad * taps[-1]
        for k in range(1, min(width, length)):
            d_x[:, : length - k].addcmul_(grad[:, k:], taps[-1 - k])
            torch.mul(grad[:, k:], x[:, : length - k], out=products[:, k:])
            d_taps[-1 - k] = products[:, k:].sum((0, 1))
        return d_x, d_taps.t().unsqueeze(1), grad.sum((0, 1))


def run_causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What `model.causal_conv_silu` states; differentiable once."""
    return _CausalConvSiLU.apply(x, weight, bias)


class _GatedRMSNorm(torch.autograd.Function):
    """rms_norm(x * silu(z)) * weight with one pass over each tensor where autograd takes three."""

    @staticmethod
    def forward(ctx, x, z, weight, eps):
        gate = F.silu(z)
        normed = gate * x
        out = normed.square()
        scale = out.mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed.mul_(scale)
        ctx.save_for_backward(x, z, gate, weight, normed, scale)
        return torch.mul(normed, weight, out=out)

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        x, z, gate, weight, normed, scale = ctx.saved_tensors
        products = grad * normed
        d_weight = products.flatten(0, -2).sum(0)
        along = products.mul_(weight).mean(-1, keepdim=True)
        d = (grad * weight).sub_(torch.mul(normed, along, out=products)).mul_(scale)  # by x * silu(z)
        d_gate = torch.mul(d, x, out=products)
        return d.mul_(gate), torch.ops.aten.silu_backward(d_gate, z), d_weight, None


def run_gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x * silu(z)) * weight: x, z [..., dim], weight [dim] -> [..., dim]; differentiable once."""
    return _GatedRMSNorm.apply(x, z, weight, eps)


# ---------------------------------------------------------------------------------------------------------------
# InfoNCE
# ---------------------------------------------------------------------------------------------------------------


class _BankLogSumExp(torch.autograd.Function):
    """logsumexp of absent + rows bank^T and its slope, softmax bank, from one softmax."""

    ROWS = 256  # at a time, which bounds the memory; fewer read the bank too often

    @staticmethod
    def forward(ctx, rows, bank, absent):
        sums, slopes = rows.new_empty(len(rows)), torch.empty_like(rows)
        codes, onednn, size = bank.t(), kernels_of(rows) == "onednn", _BankLogSumExp.ROWS
        for part, total, slope in zip(rows.split(size), sums.split(size), slopes.split(size), strict=True):
            logits = _onednn(part, bank, absent) if onednn else torch.addmm(absent, part, codes)
            softmax = torch.softmax(logits, 1)
            torch.sub(logits.amax(1), softmax.amax(1).log_(), out=total)  # x - log softmax(x) is the same for each x
            if onednn:
                slope.copy_(_onednn(softmax, codes))
            else:
                torch.mm(softmax, bank, out=slope)
        ctx.save_for_backward(slopes)
        return sums

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        return grad.unsqueeze(1) * ctx.saved_tensors[0], None, None


def run_bank_logsumexp(rows: Tensor, bank: Tensor, absent: Tensor) -> Tensor:
    """logsumexp over a bank [m, d] of absent [m] + rows [n, d] bank^T -> [n]; differentiable once, by the rows alone.

    The gradient is made in the forward pass, so that no [n, m] logits are kept. torch.softmax takes a fraction of
    the time of torch.exp on a CPU where most exponentials underflow, as those of slots not yet filled do.
    """
    return _BankLogSumExp.apply(rows, bank, absent)


# ---------------------------------------------------------------------------------------------------------------
# Adam
# ---------------------------------------------------------------------------------------------------------------


class Adam:
    """`torch.optim.Adam` by its fused kernel alone: over one vector, the rest of its step takes as long as the kernel.

    Args:
        parameters: what it trains; those without a gradient are left alone.
        lr: 0-d, read anew at every step, also by a captured one, and the caller's: no checkpoint holds it.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: Tensor):
        self.parameters, self.lr = list(parameters), lr
        self.first = [torch.zeros_like(each) for each in self.parameters]  # moments
        self.second = [torch.zeros_like(each) for each in self.parameters]
        self.steps = [torch.zeros((), device=each.device) for each in self.parameters]

    def minimise(self, loss: Tensor) -> None:
        """One step down the gradient of a loss, 0-d."""
        self.zero_grad()
        loss.backward()
        self.step()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        mine = zip(self.parameters, self.first, self.second, self.steps, strict=True)
        rows = [(each, each.grad, *state) for each, *state in mine if each.grad is not None]
        if not rows:
            return
        parameters, grads, first, second, steps = map(list, zip(*rows, strict=True))
        torch._foreach_add_(steps, 1)
        numbers = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
        torch._fused_adam_(parameters, grads, first, second, [], steps, lr=self.lr, **numbers)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"first": self.first, "second": self.second, "steps": self.steps}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Raises KeyError, ValueError or RuntimeError where the state is that of other parameters."""
        for name, own in self.state_dict().items():
            for mine, stored in zip(own, state[name], strict=True):
                if mine.shape != stored.shape:
                    raise ValueError(f"Adam's state {name} of {list(stored.shape)} is not {list(mine.shape)}")
                mine.copy_(stored)
