"""Fast forms of OPSO's encoder and its InfoNCE over a bank; those of the Mamba-2 block save passes on a GPU too."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model_kernels.choice import kernels_of
from model_kernels.mlp import differentiable_once, onednn_linear

LOG2_E = 1 / math.log(2)


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
    @differentiable_once
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
    @differentiable_once
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
    @differentiable_once
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


class _BankLogSumExp(torch.autograd.Function):
    """logsumexp of absent + rows bank^T and its slope, softmax bank, from one softmax."""

    ROWS = 256  # at a time, which bounds the memory; fewer read the bank too often

    @staticmethod
    def forward(ctx, rows, bank, absent):
        sums, slopes = rows.new_empty(len(rows)), torch.empty_like(rows)
        codes, onednn, size = bank.t(), kernels_of(rows) == "onednn", _BankLogSumExp.ROWS
        for part, total, slope in zip(rows.split(size), sums.split(size), slopes.split(size), strict=True):
            logits = onednn_linear(part, bank, absent) if onednn else torch.addmm(absent, part, codes)
            softmax = torch.softmax(logits, 1)
            torch.sub(logits.amax(1), softmax.amax(1).log_(), out=total)  # x - log softmax(x) is the same for each x
            if onednn:
                slope.copy_(onednn_linear(softmax, codes))
            else:
                torch.mm(softmax, bank, out=slope)
        ctx.save_for_backward(slopes)
        return sums

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        return grad.unsqueeze(1) * ctx.saved_tensors[0], None, None


def run_bank_logsumexp(rows: Tensor, bank: Tensor, absent: Tensor) -> Tensor:
    """logsumexp over a bank [m, d] of absent [m] + rows [n, d] bank^T -> [n]; differentiable once, by the rows alone.

    The gradient is made in the forward pass, so that no [n, m] logits are kept. torch.softmax takes a fraction of
    the time of torch.exp on a CPU where most exponentials underflow, as those of slots not yet filled do.
    """
    return _BankLogSumExp.apply(rows, bank, absent)
