"""The fast forms of the MLPs against the plain ones, the choice between them, their Adam."""

import copy
import pickle
import types

import pytest
import torch
from plain_nets import plain, plain_members
from test_offline_algorithms import make, make_batch
from test_pogo_agent import make_agent
from test_pogo_agent import make_batch as make_pogo_batch

from model import MLP
from model_kernels import Adam, choice, choose_kernels, linear
from model_kernels.choice import fastest_kernels, onednn_works
from utils import UserError

S, A, ROWS = 4, 2, 32  # widths of the two inputs; rows in a block
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the largest number of each tensor

needs_onednn = pytest.mark.skipif(not onednn_works(), reason="this PyTorch lacks the operator")
fast = pytest.mark.parametrize("kernels", ["torch", pytest.param("onednn", marks=needs_onednn)])
precise = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
few_and_many = pytest.mark.parametrize("rows", [7, 2 * ROWS + 3], ids=["one_block", "blocks"])


@pytest.fixture(autouse=True)
def chosen_anew():
    """The choice is the process's: what other tests find is what nobody has chosen."""
    yield
    choose_kernels("auto")


def make_net(*widths: int, hidden_layers: int = 2, dtype=torch.float32, **settings) -> MLP:
    torch.manual_seed(0)
    net = MLP(S + A, *(widths or (16, 1)), hidden_layers, **settings).to(dtype)
    net.rows = ROWS
    return net


def make_inputs(rows: int, dtype=torch.float32, *members: int) -> list[torch.Tensor]:
    """Observations, and actions that want a gradient."""
    generator = torch.Generator().manual_seed(1)
    s, a = (torch.randn(*members, rows, width, generator=generator, dtype=dtype) for width in (S, A))
    return [s, a.requires_grad_()]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.shape == other.shape and one.dtype == other.dtype, number
        size = float(other.detach().abs().max())
        assert size > 0 and float((one - other).detach().abs().max()) <= tolerance * size, number


def assert_same_by_both(kernels: str, work, tolerance: float) -> list[torch.Tensor]:
    """`work()` gives the same tensors by these kernels as by the plain form; returns the former."""
    choose_kernels("plain")
    wanted = work()
    choose_kernels(kernels)
    found = work()
    assert_close(found, wanted, tolerance)
    return found


def slope_like(y: torch.Tensor) -> torch.Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)


# -- equal to the plain form ------------------------------------------------------------------------------------------


@fast
@precise
@few_and_many
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=["first", "last", "both"])
@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize(
    "settings", [{"hidden_layers": 1}, {"hidden_layers": 3, "squash": True}, {"width": 40}], ids=str
)
def test_outputs_and_gradients(kernels, dtype, rows, wanted, size, settings):
    """Also of layers of 32 and more, whose gradients take another way than those of narrow ones."""
    settings = {"width": 16} | settings
    net, inputs = make_net(settings.pop("width"), 2, size=size, dtype=dtype, **settings), make_inputs(rows, dtype)
    inputs = [each.detach().requires_grad_(number in wanted) for number, each in enumerate(inputs)]

    def work():
        y = net(*inputs)
        return [y, *torch.autograd.grad(y, [*(inputs[number] for number in wanted), net.theta], slope_like(y))]

    y, *_ = assert_same_by_both(kernels, work, TOLERANCE[dtype])
    assert y.shape == (*((size,) if size else ()), rows, 2)
    usual = [module(torch.cat(inputs, 1)) for module in (plain_members(net) if size else [plain(net)])]
    usual = torch.stack(usual) if size else usual[0]
    assert_close([y], [torch.tanh(usual) if net.squash else usual], TOLERANCE[dtype])
    with torch.no_grad():
        assert torch.equal(net(*inputs), y)


@fast
@precise
@few_and_many
def test_rows_of_each_members_own(kernels, dtype, rows):
    net, inputs = make_net(16, 2, size=3, dtype=dtype), make_inputs(rows, dtype, 3)
    x = torch.cat(inputs, -1).detach().requires_grad_()

    def work():
        y = net(x)
        return [y, *torch.autograd.grad(y, [x, net.theta], slope_like(y))]

    y, *_ = assert_same_by_both(kernels, work, TOLERANCE[dtype])
    assert_close([y], [torch.stack([own(x[k]) for k, own in enumerate(plain_members(net))])], TOLERANCE[dtype])


@fast
@precise
@few_and_many
@pytest.mark.parametrize("members", [None, 1])
def test_frozen(kernels, dtype, rows, members):
    """Gradient to the last input alone, also where the weights and the first input want one."""
    net, (s, a) = make_net(16, 1, size=3, dtype=dtype), make_inputs(rows, dtype)
    s.requires_grad_()

    def work():
        y = net.frozen(s, a, members=members)
        assert y.shape == (members or 3, rows, 1)
        slopes = torch.autograd.grad(y, [s, net.theta, a], slope_like(y), allow_unused=True)
        assert slopes[0] is None and slopes[1] is None
        return [y, slopes[2]]

    assert_same_by_both(kernels, work, TOLERANCE[dtype])
    whole = net(s, a)[: members or 3]
    wanted = torch.autograd.grad(whole, a, slope_like(whole))[0]
    assert_close(work(), [whole, wanted], TOLERANCE[dtype])


@fast
@precise
@few_and_many
@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize("expectile", [None, 0.7])
def test_squared_error(kernels, dtype, rows, size, expectile):
    """Of a loss that is scaled before it is differentiated, against a loop over the rows too."""
    net, (s, a) = make_net(16, 1, size=size, dtype=dtype), make_inputs(rows, dtype)
    target = torch.randn(rows, generator=torch.Generator().manual_seed(3), dtype=dtype)

    def work():
        loss, y = net.squared_error([s, a], target, expectile)
        assert not y.requires_grad and loss.dim() == 0
        return [loss, y, *torch.autograd.grad(0.3 * loss, net.theta)]

    loss, y, _ = assert_same_by_both(kernels, work, TOLERANCE[dtype])
    assert y.shape == (*((size,) if size else ()), rows)
    total = 0.0
    for own in y.view(-1, rows):
        for value, aim in zip(own.tolist(), target.tolist(), strict=True):
            weight = 1 if expectile is None else 1 - expectile if value > aim else expectile
            total += weight * (value - aim) ** 2 / rows
    assert loss.item() == pytest.approx(total, rel=TOLERANCE[dtype])


@fast
@precise
@few_and_many
@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
def test_with_gradients(kernels, dtype, rows, hidden_layers):
    net, (s, a) = make_net(16, 1, size=3, hidden_layers=hidden_layers, dtype=dtype), make_inputs(rows, dtype)

    def work():
        q, g = net.with_gradients([s, a], A)
        loss = (q * slope_like(q)).sum() + (g**2 * slope_like(g)).sum()
        return [q, g, *torch.autograd.grad(loss, net.theta)]

    q, g, _ = assert_same_by_both(kernels, work, TOLERANCE[dtype])
    assert q.shape == (3, rows, 1) and g.shape == (3, rows, A)
    whole = net(s, a)
    wanted = [torch.autograd.grad(one.sum(), a, retain_graph=True)[0] for one in whole]
    assert_close([q, g], [whole, torch.stack(wanted)], TOLERANCE[dtype])


@fast
def test_one_network_twice_in_one_graph_sums_both_gradients(kernels):
    choose_kernels(kernels)
    net, (s, a) = make_net(16, 2), make_inputs(20)
    other = torch.randn(20, A)
    apart = [torch.autograd.grad(net(s, x).square().sum(), net.theta)[0] for x in (a, other)]
    (net(s, a).square().sum() + net(s, other).square().sum()).backward()
    assert_close([net.theta.grad], [apart[0] + apart[1]], 1e-5)
    critic, target = make_net(size=3), torch.randn(20)  # the one whose gradient is made in its forward pass
    losses = [critic.squared_error([s, x], target)[0] for x in (a, other)]
    sum(losses).backward()
    apart = [torch.autograd.grad(critic.squared_error([s, x], target)[0], critic.theta)[0] for x in (a, other)]
    assert_close([critic.theta.grad], [apart[0] + apart[1]], 1e-5)
    through = make_net(16, A)  # a network fed with its own output
    found = torch.autograd.grad(through(s, through(s, a)).sum(), [a, through.theta])
    choose_kernels("plain")
    assert_close(found, torch.autograd.grad(through(s, through(s, a)).sum(), [a, through.theta]), 1e-5)


@fast
@pytest.mark.parametrize("run", ["forward", "frozen", "squared_error", "with_gradients", "linear"])
def test_a_second_derivative_is_refused_rather_than_zero(kernels, run):
    if run == "linear" and kernels == "torch":
        pytest.skip("PyTorch's own linear layer is differentiable as often as one likes")
    choose_kernels(kernels)
    net, (s, a) = make_net(size=2), make_inputs(5)
    weight = torch.randn(3, A, requires_grad=True)
    made = {
        "forward": lambda: (net(s, a), a),
        "frozen": lambda: (net.frozen(s, a), a),
        "squared_error": lambda: (net.squared_error([s, a], torch.zeros(5))[0], net.theta),
        "with_gradients": lambda: (net.with_gradients([s, a], A)[1], net.theta),
        "linear": lambda: (linear(a, weight, None), a),
    }
    y, by = made[run]()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), by, create_graph=True)


@fast
@precise
def test_a_linear_layer_of_any_shape(kernels, dtype):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(6, 5, dtype=dtype), torch.randn(2, 9, 6, dtype=dtype, requires_grad=True)
    for bias in (layer.bias, None):
        among = [x, layer.weight] + ([] if bias is None else [bias])

        def work(bias=bias, among=among):
            y = linear(x, layer.weight, bias)
            return [y, *torch.autograd.grad(y, among, slope_like(y))]

        assert_same_by_both(kernels, work, TOLERANCE[dtype])


# -- views of the vector ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["copied", "loaded", "stepped"])
def test_no_view_of_the_parameters_is_stale(made):
    """Each network is run, so that it has its views, then changed or copied: it runs on what it holds then."""
    choose_kernels("torch")
    net, (s, a) = make_net(16, 2, size=3), make_inputs(9)
    first = net(s, a).detach()
    if made == "copied":
        other = pickle.loads(pickle.dumps(net))
    elif made == "loaded":
        other = make_net(16, 2, size=3)
        other(s, a)
        other.load_state_dict(net.state_dict())
    else:
        other, optimizer = net, Adam(net.parameters(), torch.tensor(0.1))
        optimizer.minimise(net(s, a).square().mean())
    if made != "stepped":
        assert torch.allclose(other(s, a), first, atol=1e-6)
        with torch.no_grad():
            other.theta.mul_(1.5)
    wanted = torch.stack([own(torch.cat([s, a], 1)) for own in plain_members(other)])
    assert not torch.allclose(wanted, first, atol=1e-3)
    assert_close([other(s, a)], [wanted], 1e-5)
    for own, views in zip(plain_members(other), other.members(), strict=True):
        for module, (weight, bias) in zip(own[::2], views, strict=True):
            assert torch.equal(module.weight, weight.t()) and torch.equal(module.bias, bias)
    if made == "copied":
        assert torch.equal(net(s, a), first)  # which the copy's change leaves alone


# -- Adam -------------------------------------------------------------------------------------------------------------


def test_adam_equals_pytorchs_and_its_state_goes_round():
    torch.manual_seed(0)
    mine = [torch.randn(7, requires_grad=True), torch.randn(3, 2, requires_grad=True)]
    theirs = [each.detach().clone().requires_grad_() for each in mine]
    lr = torch.tensor(1e-2)
    ours, usual = Adam(mine, lr), torch.optim.Adam(theirs, 1e-2)

    def loss(parameters, number):
        x, y = parameters
        return (x - number / 50).square().sum() + (x[:3] @ y).sin().sum() + y.pow(4).sum()

    for number in range(100):
        if number == 60:
            lr.fill_(3e-3)  # which is read anew
            usual.param_groups[0]["lr"] = 3e-3
        ours.minimise(loss(mine, number))
        usual.zero_grad()
        loss(theirs, number).backward()
        usual.step()
    assert all(torch.allclose(*pair, rtol=0, atol=1e-6) for pair in zip(mine, theirs, strict=True))

    kept = copy.deepcopy((mine, ours.state_dict()))
    again = Adam([each.detach().clone().requires_grad_() for each in kept[0]], lr)
    again.load_state_dict(kept[1])
    for number in range(100, 110):
        ours.minimise(loss(mine, number))
        again.minimise(loss(again.parameters, number))
    state, other = ours.state_dict(), again.state_dict()
    assert list(state) == ["first", "second", "steps"] and float(state["steps"][0]) == 110
    for name in state:
        assert all(torch.equal(*pair) for pair in zip(state[name], other[name], strict=True))
    assert all(torch.equal(*pair) for pair in zip(mine, again.parameters, strict=True))
    assert float(kept[1]["steps"][0]) == 100  # loading copies


# -- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, processor, works, expected",
    [
        ("AVX512", ("AuthenticAMD", 26), True, "onednn"),
        ("AVX512", ("AuthenticAMD", 25), True, "torch"),  # Zen 4 multiplies 256 bits at a time
        ("AVX512", ("GenuineIntel", 6), True, "torch"),
        ("AVX2", ("AuthenticAMD", 26), True, "torch"),
        ("DEFAULT", ("", 0), True, "torch"),  # ARM
        ("AVX512", ("AuthenticAMD", 26), False, "torch"),  # a PyTorch without the operator
    ],
)
def test_the_processor_decides(capability, processor, works, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(choice, "processor", lambda: processor)
    monkeypatch.setattr(choice, "onednn_works", lambda: works)
    assert fastest_kernels() == expected and choose_kernels("auto") == expected
    assert choose_kernels("torch") == "torch" and choose_kernels("plain") == "plain"
    if works:
        assert choose_kernels("onednn") == "onednn"
    else:
        with pytest.raises(UserError, match="lacks the operator") as told:
            choose_kernels("onednn")
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("operators", [{}, {"_linear_pointwise": lambda *_: torch.zeros(2, 4)}], ids=["no", "wrong"])
def test_an_operator_that_does_not_do_its_work_counts_as_missing(operators, monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**operators))
    assert not onednn_works.__wrapped__()


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far, as a share of the norm."""
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def by_autocast(net: MLP, s: torch.Tensor, a: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of usual modules with bfloat16 hidden layers, and the gradient of their sum by the actions."""
    outputs = []
    for module in plain_members(net):
        with torch.autocast("cpu", torch.bfloat16):
            h = module[:-1](torch.cat([s, a], 1))
        outputs.append(module[-1](h.float()))
    y = torch.stack(outputs)
    return [y, *torch.autograd.grad(y.sum(), a)]


@fast
@pytest.mark.parametrize("block", [64, 1024], ids=["blocks", "one_block"])
def test_bf16_is_within_2_percent_of_float32(kernels, block):
    """Outputs and the weights' gradients. Gradients by the input are not that near, in whatever way they are made:

    a unit near 0 is on by one precision and off by the other, and a row has no other rows to average that away. Those
    are within 2% of what autocast gives to usual modules.
    """
    net, (s, a) = make_net(64, 1, size=3, hidden_layers=3), make_inputs(256)
    net.rows, target, found = block, torch.linspace(1, 2, 256), []
    for precision in ("float32", "bf16"):
        choose_kernels(kernels, precision)
        y, q = net(s, a), net.frozen(s, a)
        loss, _ = net.squared_error([s, a], target)
        slopes = [torch.autograd.grad(x.sum(), by)[0] for x, by in ((y, net.theta), (loss, net.theta))]
        found.append([y, q, loss, *slopes, *torch.autograd.grad(net(s, a).sum(), a), *torch.autograd.grad(q.sum(), a)])
    *same, wide_slope, wide_frozen = zip(*found, strict=True)
    assert all(0 < apart(half, wide) <= 0.02 for wide, half in same)
    y, slope = by_autocast(net, s, a)
    assert apart(found[1][0], y) <= 0.005
    for wide, half in (wide_slope, wide_frozen):
        assert 0 < apart(half, wide) <= 0.15 and apart(half, slope) <= 0.02


# -- whole agents -----------------------------------------------------------------------------------------------------


def parameters_after(make_one, make_rows, kernels: str, updates: int = 100) -> list[torch.Tensor]:
    """Those of every network an agent has."""
    choose_kernels(kernels)
    agent = make_one()
    for seed in range(updates):
        agent.update(make_rows(seed, torch.float64))
    networks = getattr(agent, "networks", None)
    if networks is None:
        networks = {name: getattr(agent, name) for name in ("critic", "actors", "critic_target", "actor_target")}
    return [parameter.detach() for network in networks.values() for parameter in network.parameters()]


@pytest.mark.parametrize("name", ["td3_bc", "iql", "awac", "sac_n", "edac", "cql", "pogo"])
def test_100_updates_by_either_form_lead_to_the_same_parameters(name):
    """In float64, to 1e-5; POGO with three actors."""

    def make_one():
        if name == "pogo":
            return make_agent(hidden_dim=8, dtype=torch.float64)
        small = {"hidden_dim": 8} | ({"num_critics": 3} if name in ("sac_n", "edac") else {})
        return make(name, dtype=torch.float64, **small)

    make_rows = make_pogo_batch if name == "pogo" else make_batch
    start = parameters_after(make_one, make_rows, "plain", 0)
    wanted, found = (parameters_after(make_one, make_rows, kernels) for kernels in ("plain", "torch"))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float64 and torch.allclose(one, other, rtol=0, atol=1e-5)
    moved = [not torch.equal(one, old) for one, old in zip(found, start, strict=True)]
    assert sum(moved) >= len(moved) - (name == "cql")  # whose multiplier is idle


# -- what a fast form must not hide -----------------------------------------------------------------------------------


every = pytest.mark.parametrize("kernels", ["torch", pytest.param("onednn", marks=needs_onednn), "plain"])


@every
def test_nan_goes_through_every_form(kernels):
    choose_kernels(kernels)
    net, x = MLP(5, 8, 1, size=2), torch.ones(4, 5)
    x[1] = torch.nan
    assert net(x)[:, 1].isnan().all() and net(x)[:, 2:].isfinite().all()
    loss, _ = net.squared_error([x], torch.zeros(4))
    loss.backward()
    assert loss.isnan() and net.theta.grad.isnan().any()


@every
def test_no_rows_give_no_gradient(kernels):
    choose_kernels(kernels)
    net = MLP(5, 8, 1, size=2)
    net(torch.zeros(0, 5)).sum().backward()
    assert (net.theta.grad == 0).all()
