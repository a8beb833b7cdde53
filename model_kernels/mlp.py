"""MLPs on a CPU: one node of the graph each, whose parameters are one vector and whose gradient is another.

With a node a layer, overhead would take as long as the products. Networks of an ensemble run one after the other, in
blocks of rows, so that what one computes is still in the core's cache when its backward pass reads it.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_kernels.choice import cache_bytes, kernels_of, uses_bf16

NARROW = 32  # a product of fewer columns than this is several times as fast when its transpose is computed


def differentiable_once(backward: Callable) -> Callable:
    """Refuse a second derivative, which `once_differentiable` takes for zero where no graph leads to the gradient."""

    @functools.wraps(backward)
    def refusing(ctx, *gradients):
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("a fast form is differentiable once: a second derivative needs kernels plain")
        return backward(ctx, *gradients)

    return refusing


# -- Products ---------------------------------------------------------------------------------------------------------


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; x [n, in] and weight [out, in] contiguous or transposed, anything else is very slow.

    Its own relu is not used: it makes 0 of nan, and a run that diverged would not be noticed.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """x [n, in] by weight [out, in] and bias [out] or none, by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        d_y = d_y.contiguous()
        return (
            onednn_linear(d_y, weight.t()) if to_x else None,
            onednn_linear(d_y.t(), x.t()) if to_weight else None,
            d_y.sum(0) if to_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `F.linear` gives: x [..., in], weight [out, in], bias [out] or none -> [..., out]; differentiable once."""
    kernels = kernels_of(x)
    if kernels != "plain" and uses_bf16() and x.dtype == torch.float32:
        return F.linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()).to(x.dtype)
    if kernels != "onednn" or len(weight) == 1:
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


def _mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    if not 1 < b.shape[-1] < NARROW:
        return torch.mm(a, b, out=out)
    product = torch.mm(b.t(), a.t()).t()
    return product if out is None else out.copy_(product)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if 1 < weight.shape[-1] < NARROW:
        return _mm(x, weight).add_(bias)
    return torch.addmm(bias, x, weight)


# -- The passes through a network -------------------------------------------------------------------------------------


class FlatMLP(nn.Module):
    """The parameters of `size` MLPs (None: one, shown without that dimension) in one vector, `theta`.

    Layer by layer all weights, then all biases; widths: of the input, the hidden layers and the output.
    """

    def __init__(self, widths: tuple[int, ...], size: int | None):
        super().__init__()
        self.widths, self.size, self.count = widths, size, size or 1
        self.theta = nn.Parameter(torch.empty(self.count * sum((a + 1) * b for a, b in itertools.pairwise(widths))))
        # Rows at a time on a CPU: a block's values and their gradients then stay in the cache.
        self.rows = max(64, cache_bytes() // (8 * max(widths[1:])))
        self._members: tuple[int, list] = (0, [])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_members": (0, [])}  # a copy has views of its own

    def layers(self, theta: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Views of the vector: each layer's weight [size, in, out] and bias [size, 1, out], or [in, out] and [out]."""
        layers = self._views(self.theta if theta is None else theta)
        return layers if self.size else [(weight[0], bias[0, 0]) for weight, bias in layers]

    def members(self, theta: Tensor | None = None) -> list[list[tuple[Tensor, Tensor]]]:
        """Of each network, each layer's weight [in, out] and bias [out], as views of a vector.

        Those of the parameters are without gradient, and kept while these stay where they are.
        """
        if theta is not None:
            layers = self._views(theta)
            return [[(weight[k], bias[k, 0]) for weight, bias in layers] for k in range(self.count)]
        if self._members[0] != self.theta.data_ptr():
            self._members = self.theta.data_ptr(), self.members(self.theta.detach())
        return self._members[1]

    def _views(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        shapes = list(itertools.pairwise(self.widths))
        pieces = iter(theta.split([n * self.count for a, b in shapes for n in (a * b, b)]))
        return [(next(pieces).view(self.count, a, b), next(pieces).view(self.count, 1, b)) for a, b in shapes]


def _library(x: Tensor) -> str:
    """What multiplies between hidden layers: torch, onednn, or bf16, whose products PyTorch gives to oneDNN itself."""
    return "bf16" if uses_bf16() and x.dtype == torch.float32 else kernels_of(x)


def _passes(net, members: int, *tensors: Tensor) -> Iterator[tuple[int, bool, Sequence[Tensor]]]:
    """A member's number, whether this is its first block, the block's rows of tensors [n, ...], [members, n, ...]."""
    for k in range(members):
        own = [each if each.dim() == 2 else each[k] for each in tensors]
        if len(own[0]) <= net.rows:
            yield k, True, own
        else:
            for number, block in enumerate(zip(*(each.split(net.rows) for each in own), strict=True)):
                yield k, number == 0, block


def _values(net, members: int, x: Tensor, keep: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Outputs [members, n, out] of x [n, in] or [members, n, in], and all hidden values if they are to be kept."""
    library, outputs, saved = _library(x), [], []
    for k, _, (rows,) in _passes(net, members, x):
        output, hidden = _forward(rows, net.members()[k], library)
        outputs.append(output)
        if keep:
            saved += hidden
    return _assembled(outputs, members), saved


def _new_gradient(net, members: int) -> tuple[Tensor, list[list[tuple[Tensor, Tensor]]]]:
    """A vector for the gradient of theta, and its views; zero where members are left out."""
    d_theta = torch.empty_like(net.theta, requires_grad=False)
    if members < net.count:
        d_theta.zero_()
    return d_theta, net.members(d_theta)


def _assembled(passes: list[Tensor], members: int) -> Tensor:
    """[members, n, ...] of what each pass gave."""
    whole = passes[0] if len(passes) == 1 else torch.cat(passes)
    return whole.view(members, -1, whole.shape[-1])


def _forward(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], library: str) -> tuple[Tensor, list[Tensor]]:
    hidden, dtype = [], x.dtype
    for weight, bias in layers[:-1]:
        if library == "onednn":
            x = onednn_linear(x, weight.t(), bias)
        elif library == "bf16":
            x = _affine(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
        else:
            x = _affine(x, weight, bias)
        hidden.append(x.relu_())
    return _affine(x.to(dtype) if library == "bf16" else x, *layers[-1]), hidden


def _backward(
    values: Sequence[Tensor],
    d_y: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    into: list[tuple[Tensor, Tensor]] | None,
    first: bool,
    library: str,
) -> Tensor:
    """From the gradient of the output to that behind the first layer, [n, width]; the parameters' go to `into`.

    first: write these, else add to them. In bf16, only the last layer's products are in the parameters' precision.
    """
    dtype = d_y.dtype
    for number in range(len(layers) - 1, 0, -1):
        value, weight = values[number], layers[number][0]
        if into is not None:
            _add_layer(value, d_y, *into[number], first, library)
        if weight.shape[-1] == 1:
            d_y = d_y * weight.t()
        elif library == "onednn":
            d_y = onednn_linear(d_y, weight)
        else:
            d_y = _mm(d_y, weight.t() if d_y.dtype == dtype else weight.t().bfloat16())
        d_y = relu_backward(d_y.bfloat16() if library == "bf16" else d_y, value)
    if into is not None:
        _add_layer(values[0], d_y, *into[0], first, library)
    return d_y.to(dtype)


def _add_layer(x: Tensor, d_y: Tensor, weight: Tensor, bias: Tensor, first: bool, library: str) -> None:
    """Write (or, where it is not the first, add) x^T d_y [in, out] and the sum of d_y to a layer's gradients."""
    if library == "bf16":
        x = x.to(d_y.dtype)
    if library == "onednn" and weight.shape[-1] >= NARROW:
        product = onednn_linear(x.t(), d_y.t())
    else:
        product = _mm(x.t(), d_y, weight if first and d_y.dtype == weight.dtype else None)
    if product is not weight:
        weight.copy_(product) if first else weight.add_(product)
    torch.sum(d_y, 0, out=bias) if first else bias.add_(d_y.sum(0))


def relu_backward(d_y: Tensor, y: Tensor) -> Tensor:
    """d_y where y is positive, else 0; in place."""
    return torch.ops.aten.threshold_backward.grad_input(d_y, y, 0, grad_input=d_y)


# -- Nodes of the graph -----------------------------------------------------------------------------------------------


class _MLP(torch.autograd.Function):
    """The first `members` of MLPs: inputs [n, ...], side by side the input of all, or [members, n, in], one of each."""

    @staticmethod
    def forward(ctx, theta, net, members, squash, *inputs):
        """-> [members, n, out]."""
        x = _concatenate(inputs)
        ctx.net, ctx.squash, ctx.inputs = net, squash, [each.shape[-1] for each in inputs]
        y, saved = _values(net, members, x)
        if squash:
            y.tanh_()
        ctx.save_for_backward(y, theta, x, *saved)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, d_y):
        y, _, x, *saved = ctx.saved_tensors
        to_theta, _, _, _, *to_inputs = ctx.needs_input_grad
        if ctx.squash:
            d_y = torch.ops.aten.tanh_backward(d_y, y)
        begin, end = _wanted_columns(ctx.inputs, to_inputs)
        members, depth, library, d_inputs = len(d_y), len(ctx.net.widths) - 2, _library(x), []
        d_theta, into = _new_gradient(ctx.net, members) if to_theta else (None, None)
        for k, first, (rows, d_rows) in _passes(ctx.net, members, x, d_y):
            hidden, saved = saved[:depth], saved[depth:]
            layers = ctx.net.members()[k]
            d_rows = _backward([rows, *hidden], d_rows, layers, into and into[k], first, library)
            if end > begin:
                d_inputs.append(_mm(d_rows, layers[0][0][begin:end].t()))
        d_x = _assembled(d_inputs, members) if d_inputs else None
        if d_x is not None and x.dim() == 2:
            d_x = d_x.sum(0) if members > 1 else d_x[0]
        return d_theta, None, None, None, *_by_input(d_x, begin, ctx.inputs, to_inputs)


class _Regression(torch.autograd.Function):
    """Squared error of MLPs of one output, its gradient made in the forward pass."""

    @staticmethod
    def forward(ctx, theta, net, target, expectile, *inputs):
        """-> the error, 0-d, and the outputs [size, n, 1]."""
        x = _concatenate(inputs)
        if target.shape != x.shape[:1] or target.requires_grad:
            raise ValueError(f"a target {list(target.shape)} of {list(x.shape)} inputs must be [n], without gradient")
        members, library, outputs, loss = net.count, _library(x), [], 0
        ctx.d_theta, into = _new_gradient(net, members)
        for k, first, (rows, wanted) in _passes(net, members, x, target.unsqueeze(1)):
            output, hidden = _forward(rows, net.members()[k], library)
            error = output - wanted
            d_y = error * (2 / len(x))
            if expectile is not None:
                d_y.mul_((error > 0).to(error.dtype).sub_(expectile).abs_())
            _backward([rows, *hidden], d_y, net.members()[k], into[k], first, library)
            outputs.append(output)
            loss = loss + torch.dot(d_y.view(-1), error.view(-1))
        y = _assembled(outputs, members)
        ctx.mark_non_differentiable(y)
        return loss / 2, y

    @staticmethod
    @differentiable_once
    def backward(ctx, d_error, _):
        d_theta, ctx.d_theta = ctx.d_theta, None  # handed on, so that it becomes theta's gradient without a copy
        if d_theta is None:
            raise RuntimeError("a squared error of a fast form has one backward pass")
        return d_theta if d_error == 1 else d_theta.mul_(d_error), *[None] * (len(ctx.needs_input_grad) - 1)


class _Frozen(torch.autograd.Function):
    """The first `members` of MLPs of one output, with a gradient to the last input alone, made in the forward pass."""

    @staticmethod
    def forward(ctx, net, members, *inputs):
        """-> [members, n, 1]."""
        x, library, outputs, d_inputs = _concatenate(inputs), _library(inputs[0]), [], []
        for k, first, (rows,) in _passes(net, members, x):
            layers = net.members()[k]
            output, hidden = _forward(rows, layers, library)
            d_rows = _backward([rows, *hidden], torch.ones_like(output), layers, None, first, library)
            d_inputs.append(_mm(d_rows, layers[0][0][-inputs[-1].shape[1] :].t()))
            outputs.append(output)
        ctx.save_for_backward(_assembled(d_inputs, members))
        return _assembled(outputs, members)

    @staticmethod
    @differentiable_once
    def backward(ctx, d_y):
        d_x = ctx.saved_tensors[0] * d_y
        return *[None] * (len(ctx.needs_input_grad) - 1), d_x.sum(0) if len(d_x) > 1 else d_x[0]


class _MLPWithGradients(torch.autograd.Function):
    """Outputs q of MLPs and their gradients g by the last columns of their input, both differentiable by the weights.

    With h_l = relu(h_{l-1} W_l + b_l), q = h_L w + c and m_l where h_l is positive:

        u_L = w^T m_L        u_{l-1} = (u_l W_l^T) m_{l-1}        g = u_1 W_1^T, the last columns of W_1^T alone

    Each of these products is differentiated like a layer; the masks are constants.
    """

    @staticmethod
    def forward(ctx, theta, net, columns, *inputs):
        """-> q [size, n, 1], g [size, n, columns]."""
        x, size = _concatenate(inputs), net.count
        ctx.net, ctx.columns, ctx.library = net, columns, kernels_of(x)
        q, g, saved = [], [], []
        for layers in net.members():
            output, values = _forward(x, layers, ctx.library)
            d_q = layers[-1][0].t().expand_as(values[-1])
            backwards = [torch.ops.aten.threshold_backward(d_q, values[-1], 0)]  # u_L, ..., u_1
            for (weight, _), value in zip(layers[-2:0:-1], values[-2::-1], strict=True):
                backwards.append(relu_backward(_times(backwards[-1], weight.t(), ctx.library), value))
            q.append(output)
            g.append(_mm(backwards[-1], layers[0][0][-columns:].t()))
            saved += values + backwards[::-1]
        ctx.save_for_backward(theta, x, *saved)
        return _assembled(q, size), _assembled(g, size)

    @staticmethod
    @differentiable_once
    def backward(ctx, d_q, d_g):
        (theta, x, *saved), net, columns, library = ctx.saved_tensors, ctx.net, ctx.columns, ctx.library
        depth, d_theta = len(net.widths) - 2, torch.empty_like(theta)
        for k, (layers, into) in enumerate(zip(net.members(), net.members(d_theta), strict=True)):
            own, saved = saved[: 2 * depth], saved[2 * depth :]
            values, backwards = own[:depth], own[depth:]  # h_1, ..., h_L; u_1, ..., u_L
            _backward([x, *values], d_q[k], layers, into, True, library)
            into[0][0][-columns:].add_(_mm(d_g[k].t(), backwards[0]))
            d_u = relu_backward(_mm(d_g[k], layers[0][0][-columns:]), values[0])
            for number in range(1, depth):
                into[number][0].add_(_times(d_u.t(), backwards[number], library))
                d_u = relu_backward(_times(d_u, layers[number][0], library), values[number])
            into[-1][0].add_(d_u.sum(0).unsqueeze(1))
        return d_theta, None, None, *[None] * len(ctx.needs_input_grad[3:])


def _times(a: Tensor, b: Tensor, library: str) -> Tensor:
    return onednn_linear(a, b.t()) if library == "onednn" else _mm(a, b)


def _concatenate(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)


def _wanted_columns(widths: Sequence[int], wanted: Sequence[bool]) -> tuple[int, int]:
    columns = [(sum(widths[:i]), sum(widths[: i + 1])) for i, want in enumerate(wanted) if want]
    return (columns[0][0], columns[-1][1]) if columns else (0, 0)


def _by_input(d_x: Tensor | None, begin: int, widths: Sequence[int], wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    """The gradient of each input that wants one, of those of x's columns from `begin` on."""
    if d_x is None:
        return [None] * len(widths)
    ends = [sum(widths[: i + 1]) - begin for i in range(len(widths))]
    return [d_x[..., end - n : end] if want else None for end, n, want in zip(ends, widths, wanted, strict=True)]


def run_mlp(net, theta: Tensor, members: int, inputs: Sequence[Tensor], squash: bool = False) -> Tensor:
    """The first `members` of a `model.MLP` with parameters theta as one node of the graph, [members, n, out].

    inputs: [n, ...], side by side the input of every member; or one of [members, n, in]. squash: the output is its
    tanh. The node can be differentiated once, not twice.
    """
    if torch.is_grad_enabled():
        return _MLP.apply(theta, net, members, squash, *inputs)
    y, _ = _values(net, members, _concatenate(inputs), keep=False)
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
        return _values(net, members, _concatenate(inputs), keep=False)[0]
    return _Frozen.apply(net, members, *inputs)


def run_mlp_with_gradients(net, inputs: Sequence[Tensor], columns: int) -> tuple[Tensor, Tensor]:
    """Outputs [size, n, 1] of a `model.MLP` and their gradients by its input's last columns [size, n, columns].

    Both are differentiable, once, by the parameters; not by the inputs [n, ...], which lie side by side.
    """
    return _MLPWithGradients.apply(net.theta, net, columns, *inputs)
