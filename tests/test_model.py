"""The encoder against slow oracles: a float64 sequential scan, and transformers' Mamba-2; the heads."""

import logging

import pytest
import torch
import torch.nn.functional as F

import model
from model import GoalValue, InverseDynamics, Mamba2, MambaEncoder, NextState, OfflineModel, RewardLogit, TransitionQ
from model_kernels import choice, cuda


def sequential_mamba2(block: Mamba2, u: torch.Tensor) -> torch.Tensor:
    """The block's equations one position at a time, written from the paper and sharing no code with model.py."""
    batch, length, _ = u.shape
    inner, n, heads, p = block.d_inner, block.d_state, block.nheads, block.headdim
    weight, width = block.conv1d.weight, block.conv1d.weight.shape[-1]
    projected = u @ block.in_proj.weight.t()
    z, xBC, dt = projected[..., :inner], projected[..., inner : 2 * inner + 2 * n], projected[..., 2 * inner + 2 * n :]
    h = torch.zeros(batch, heads, p, n, dtype=u.dtype)
    A = -torch.exp(block.A_log)
    outputs = []
    for t in range(length):
        c = block.conv1d.bias.expand(batch, -1)
        for k in range(width):
            if t - k >= 0:
                c = c + xBC[:, t - k] * weight[:, 0, width - 1 - k]
        c = c * torch.sigmoid(c)
        x, B, C = c[:, :inner].view(batch, heads, p), c[:, inner : inner + n], c[:, inner + n :]
        step = torch.log1p(torch.exp(dt[:, t] + block.dt_bias))
        h = h * torch.exp(step * A)[:, :, None, None] + torch.einsum("bh,bhp,bn->bhpn", step, x, B)
        y = torch.einsum("bhpn,bn->bhp", h, C) + x * block.D[:, None]
        g = y.reshape(batch, inner) * z[:, t] * torch.sigmoid(z[:, t])
        g = g / torch.sqrt(g.square().mean(-1, keepdim=True) + 1e-5) * block.norm.weight
        outputs.append(g @ block.out_proj.weight.t())
    return torch.stack(outputs, dim=1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def block(chunk_size=128, seed=0, **sizes) -> Mamba2:
    torch.manual_seed(seed)
    mixer = Mamba2(**({"d_model": 32, "d_state": 16, "headdim": 16} | sizes), chunk_size=chunk_size, backend="torch")
    with torch.no_grad():  # not the initial ones and zeros, which would hide a missing factor
        mixer.D.uniform_(0.5, 2)
        mixer.norm.weight.uniform_(0.5, 2)
    return mixer


@pytest.mark.parametrize("length,chunk_size", [(1, 128), (2, 128), (7, 128), (40, 128), (40, 16), (33, 8), (9, 1)])
def test_block_equals_the_sequential_scan(length, chunk_size):
    mixer = block(chunk_size)
    u = torch.randn(3, length, 32, requires_grad=True)
    weight = torch.randn(3, length, 32)
    (mixer(u) * weight).sum().backward()
    grads = {name: parameter.grad for name, parameter in mixer.named_parameters()} | {"u": u.grad}
    oracle = block(chunk_size).double()
    u64 = u.detach().double().requires_grad_()
    expected = sequential_mamba2(oracle, u64)
    (expected * weight.double()).sum().backward()
    assert relative(mixer(u), expected) < 1e-5
    slow = {name: parameter.grad for name, parameter in oracle.named_parameters()} | {"u": u64.grad}
    for name, gradient in grads.items():
        if slow[name].abs().max() == 0:  # a single position: A and the older taps have no effect
            assert gradient is None or gradient.abs().max() == 0, name
        else:
            assert relative(gradient, slow[name]) < 1e-5, name


@pytest.mark.parametrize("length", [1, 100])
def test_block_equals_transformers(length):
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    from transformers import Mamba2Config

    mixer = block(d_model=64, d_state=32, headdim=32)
    config = Mamba2Config(
        num_heads=4, head_dim=32, hidden_size=64, state_size=32, expand=2, n_groups=1, conv_kernel=4, chunk_size=128,
        use_bias=False, num_hidden_layers=1, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    oracle = mamba2.Mamba2Mixer(config, 0)
    oracle.load_state_dict(mixer.state_dict())  # the same names and shapes
    u, weight = torch.randn(2, length, 64), torch.randn(2, length, 64)
    ours, theirs = u.clone().requires_grad_(), u.clone().requires_grad_()
    (mixer(ours) * weight).sum().backward()
    (oracle(theirs) * weight).sum().backward()
    assert relative(mixer(u), oracle(u)) < 1e-4
    assert relative(ours.grad, theirs.grad) < 1e-4
    slow = dict(oracle.named_parameters())
    for name, parameter in mixer.named_parameters():
        if slow[name].grad is not None and slow[name].grad.abs().max() > 0:
            assert relative(parameter.grad, slow[name].grad) < 1e-4, name


def test_parameters_have_the_names_and_shapes_of_mamba_ssm():
    # Read off mamba_ssm.Mamba2(d_model=128, d_state=64, d_conv=4, expand=2, headdim=64).
    expected = {
        "dt_bias": (4,), "A_log": (4,), "D": (4,), "in_proj.weight": (644, 128), "conv1d.weight": (384, 1, 4),
        "conv1d.bias": (384,), "norm.weight": (256,), "out_proj.weight": (128, 256),
    }  # fmt: skip
    assert {name: tuple(p.shape) for name, p in Mamba2(128).named_parameters()} == expected


def encoder(**sizes) -> MambaEncoder:
    torch.manual_seed(1)
    net = MambaEncoder(5, d_model=32, n_layers=2, d_state=16, backend="torch", **sizes)
    net.set_normalizer(torch.randn(5), torch.rand(5) + 0.5)
    return net


def test_encoder_is_causal():
    net, x = encoder(), torch.randn(2, 30, 5)
    changed = x.clone()
    changed[:, 17:] = torch.randn(2, 13, 5) * 100
    codes = net(x)
    assert torch.equal(codes[:, :17], net(changed)[:, :17])
    assert not torch.allclose(codes[:, 17:], net(changed)[:, 17:])


def test_goal_is_a_sequence_of_one():
    net, goals = encoder(), torch.randn(3, 7, 5)
    codes = net.encode_goal(goals)
    assert codes.shape == (3, 7, 32)
    assert torch.allclose(codes[1, 2], net(goals[1, 2].view(1, 1, 5))[0, 0], atol=1e-6)


def test_codes_depend_on_order_and_position():
    net, x = encoder(), torch.randn(1, 10, 5)
    assert not torch.allclose(net(x)[:, -1], net(x.flip(1))[:, -1], atol=1e-3)
    rotated = model.rotary(torch.ones(1, 3, 8), torch.arange(3))
    assert torch.equal(rotated[0, 0], torch.ones(8))  # position 0 is untouched, which is where goals stand
    assert torch.allclose(rotated.norm(dim=-1), torch.full((1, 3), 8.0).sqrt())


def test_mixed_precision_keeps_parameters_and_scan_in_float32():
    net, x = encoder(), torch.randn(2, 101, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = net(x)
    codes.float().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in net.parameters())
    assert relative(codes, net(x)) < 0.05  # bfloat16 has three digits
    positions = torch.arange(101)
    half = model.rotary(x.expand(2, 101, 5)[..., :4].bfloat16(), positions)
    assert relative(half[:, 90:], model.rotary(x[..., :4], positions)[:, 90:]) < 0.01  # late positions are no worse


def test_backends():
    net = Mamba2(32, headdim=16, backend="cuda")
    with pytest.raises((ImportError, ValueError), match=r"requirements/cuda.txt|runs on a GPU"):
        net(torch.randn(1, 4, 32))
    with pytest.raises(ValueError, match="choose one of auto, torch, cuda"):
        Mamba2(32, headdim=16, backend="fast")(torch.randn(1, 4, 32))


def test_auto_backend_logs_its_choice_once(caplog):
    cuda._announced.cache_clear()
    with caplog.at_level(logging.INFO, logger="model_kernels.cuda"):
        for _ in range(3):
            Mamba2(32, headdim=16, backend="auto")(torch.randn(1, 4, 32))
    assert [record.message for record in caplog.records] == ["Mamba-2 backend: torch"]


@pytest.mark.gpu
@pytest.mark.cuda_packages
def test_cuda_kernels_equal_the_torch_backend():
    pytest.importorskip("mamba_ssm")
    mixer = block(d_model=128, d_state=64, headdim=64).cuda()
    u = torch.randn(4, 100, 128, device="cuda")
    expected = mixer(u)
    mixer.backend = "cuda"
    assert relative(mixer(u), expected) < 1e-3


def test_heads_have_the_shapes_they_state():
    z, z_next, z_goal = (torch.randn(4, 6, 32) for _ in range(3))
    q = TransitionQ(32, 64)
    assert q(z, z_next, z_goal).shape == (2, 4, 6)
    assert GoalValue(32, 64)(z, z_goal).shape == (4, 6)
    assert NextState(32, 64)(z, z_goal).shape == (4, 6, 32)
    assert RewardLogit(32, 64)(z_next, z_goal).shape == (4, 6)
    action = InverseDynamics(32, 64, 3)(z, z_next, z_goal)
    assert action.shape == (4, 6, 3) and action.abs().max() <= 1


def test_twin_q_is_two_separate_networks():
    q = TransitionQ(8, 16)
    z, z_next, z_goal = (torch.randn(5, 8) for _ in range(3))
    for i in range(2):
        h = torch.cat([z, z_next, z_goal], dim=-1)
        for k, (weight, bias) in enumerate(q.net.layers()):
            h = h @ weight[i] + bias[i]
            h = F.relu(h) if k < 2 else h
        assert torch.allclose(q(z, z_next, z_goal)[i], h.squeeze(-1), atol=1e-6)
    q(z, z_next, z_goal)[0].sum().backward()
    for weight, bias in q.net.layers(q.net.theta.grad):
        assert weight[1].abs().max() == 0 and bias[1].abs().max() == 0
        assert weight[0].abs().max() > 0 and bias[0].abs().max() > 0


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="odd"):
        MambaEncoder(3, d_model=31)
    with pytest.raises(ValueError, match="multiple of headdim"):
        Mamba2(24, headdim=64)


def test_offline_model_holds_no_action_head():
    names = {name.split(".")[0] for name, _ in OfflineModel(4, 32, 16).named_parameters()}
    assert names == {"encoder", "q", "v", "next_state", "reward"}


def with_gradients(compute, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The value of a function and the gradient of each input, under a fixed random weight of the value."""
    inputs = [each.detach().clone().requires_grad_() for each in inputs]
    value = compute(*inputs)
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=value.dtype)
    return [value.detach(), *torch.autograd.grad((value * weight).sum(), inputs)]


FORMS = {  # name: the form, and the shapes of what it takes
    "dual form": (model.dual_form, [(2, 9, 5), (2, 9, 5), (2, 3, 9), (2, 3, 9), (2, 3, 9, 4)]),
    "convolution": (model.causal_conv_silu, [(2, 9, 6), (6, 1, 4), (6,)]),
    "convolution of fewer than its width": (model.causal_conv_silu, [(2, 3, 6), (6, 1, 4), (6,)]),
    "norm": (lambda x, z, weight: gated_norm(x, z, weight), [(2, 9, 6), (2, 9, 6), (6,)]),
}


def gated_norm(x, z, weight):
    norm = model.RMSNormGated(len(weight)).double()
    return torch.func.functional_call(norm, {"weight": weight}, (x, z))


@pytest.mark.parametrize("name", FORMS)
def test_fast_forms_of_the_block_equal_their_plain_forms(name, monkeypatch):
    """In float64: the value and the gradient of every input."""
    form, shapes = FORMS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if name == "dual form":  # decay falls along the chunk, at the end to nothing
        inputs[2] = -inputs[2].abs().cumsum(-1) * torch.linspace(1, 100, 9)
    found = {}
    for kernels in ("plain", "torch"):
        monkeypatch.setattr(choice._Chosen, "kernels", kernels)
        found[kernels] = with_gradients(form, *inputs)
    for fast, plain in zip(found["torch"], found["plain"], strict=True):
        assert torch.isfinite(plain).all() and relative(fast, plain) < 1e-10


@pytest.mark.parametrize("kernels", ["plain", "onednn"])
def test_encoder_is_the_same_by_all_kernels(kernels, monkeypatch):
    """In float32, the gradient of every parameter too, by three chunks of a scan and by single states."""
    if kernels == "onednn" and not choice.onednn_works():
        pytest.skip("this PyTorch has no such operator")
    x, found = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0)), {}
    for chosen in ("torch", kernels):
        monkeypatch.setattr(choice._Chosen, "kernels", chosen)
        net = encoder()
        for mixer in net.mixers:
            mixer.chunk_size = 7
        codes = torch.cat([net(x), net.encode_goal(x)])
        codes.square().sum().backward()
        found[chosen] = {name: p.grad for name, p in net.named_parameters()} | {"codes": codes}
    for name, expected in found["torch"].items():
        assert relative(found[kernels][name], expected) < 1e-4, name
