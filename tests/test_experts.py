"""Policy files and their environments: what is written is read back and acts as the network does; cards are true."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmark_data import experts
from benchmark_data.experts import ENVIRONMENTS, Policy, evaluate_policy, read_policy, write_policy
from utils import UserError

SHIPPED = sorted(experts.DEFAULT_EXPERTS_DIR.glob("*.safetensors"))
MAX_SHIPPED_BYTES = 8_000_000


def network(sizes=(11, 32, 32, 3), seed=0):
    """Random float32 weights of an MLP; the log standard deviations go beyond any bounds."""
    rng = np.random.default_rng(seed)
    names = [f"hidden.{index}" for index in range(len(sizes) - 2)] + ["mean"]
    shapes = dict(zip(names, zip(sizes[:-1], sizes[1:], strict=True), strict=True))
    weights = {}
    for name, shape in (shapes | {"log_std": shapes["mean"]}).items():
        scale = 30.0 if name == "log_std" else 1.0
        weights[f"{name}.weight"] = (scale * rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        weights[f"{name}.bias"] = (0.1 * rng.standard_normal(shape[1])).astype(np.float32)
    return weights


def hopper_policy(**settings):
    return Policy("hopper", 7, **{"weights": network(), "activation": "gelu_tanh", "log_std_min": -5.0} | settings)


def reference(policy, observation):
    """Mean before tanh and log standard deviation in float64, from the formulas."""
    activations = {
        "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: np.where(x > 0, x, 0),
    }
    weights = {name: array.astype(np.float64) for name, array in policy.weights.items()}
    x = observation.astype(np.float64)
    for index in range(len(policy.layer_names) - 2):
        x = activations[policy.activation](x @ weights[f"hidden.{index}.weight"] + weights[f"hidden.{index}.bias"])
    mean = x @ weights["mean.weight"] + weights["mean.bias"]
    return mean, x @ weights["log_std.weight"] + weights["log_std.bias"]


@pytest.mark.parametrize("activation", sorted(experts.ACTIVATIONS))
def test_act_is_the_network(activation):
    policy = hopper_policy(activation=activation)
    observations = np.random.default_rng(1).standard_normal((50, 11)).astype(np.float32)
    mean, log_std = reference(policy, observations)
    assert log_std.min() < -5 and log_std.max() > 2, "the bounds are to be tried"
    batch = policy.act(observations)
    assert batch.dtype == np.float32 and batch.shape == (50, 3)
    np.testing.assert_allclose(batch, np.tanh(mean), atol=1e-7)
    samples = policy.act(observations, np.random.default_rng(2))
    noise = np.random.default_rng(2).standard_normal((50, 3))
    expected = np.tanh(mean + np.exp(np.clip(log_std, -5, 2)) * noise)
    np.testing.assert_allclose(samples, expected, atol=1e-7)
    one = policy.act(observations[0].astype(np.float64))  # as an environment gives it
    assert one.shape == (3,) and one.dtype == np.float32
    np.testing.assert_allclose(one, batch[0], atol=1e-7)


ACTING = """
import sys
import numpy as np
from benchmark_data import experts
policy, rng = experts.read_policy(sys.argv[1]), np.random.default_rng(0)
observations = rng.standard_normal((300, policy.sizes[0])).astype(np.float32)
actions = np.stack([policy.act(each, rng) for each in observations])
rounded = np.stack([each @ policy.weights["hidden.0.weight"] for each in observations])  # in float32
print(hash(rounded.tobytes()), hash(actions.tobytes()))
"""


@pytest.mark.parametrize("name", ["hopper_30000", "ant-xy_400000"])
def test_actions_do_not_depend_on_the_processor(name):
    """OpenBLAS takes other kernels on other processors: its variable chooses those of one."""
    path = experts.DEFAULT_EXPERTS_DIR / f"{name}.safetensors"
    found = set()
    for core in ("Nehalem", "Haswell"):
        environment = os.environ | {"OPENBLAS_CORETYPE": core, "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-c", ACTING, str(path)]
        done = subprocess.run(
            command, cwd=path.parents[2], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        found.add(tuple(done.stdout.split()))
    products, actions = ({each[number] for each in found} for number in (0, 1))
    if len(products) == 1:
        pytest.skip("this NumPy rounds products alike whatever the variable says")
    assert len(actions) == 1


def test_round_trip(tmp_path):
    """Of a transposed weight, too: safetensors writes memory as it lies, so that a view would come back transposed."""
    square = network()["hidden.1.weight"]
    assert not np.array_equal(square, square.T)
    policy = hopper_policy(weights=network() | {"hidden.1.weight": np.ascontiguousarray(square.T).T})
    path, other = experts.policy_path(tmp_path, "hopper", 7), tmp_path / "again.safetensors"
    write_policy(path, policy)
    again = read_policy(path)
    for name in experts.SETTINGS:
        assert getattr(again, name) == getattr(policy, name)
    assert again.sizes == (11, 3) and set(again.weights) == set(policy.weights)
    for name, array in policy.weights.items():
        np.testing.assert_array_equal(again.weights[name], array)
    write_policy(other, again)
    assert other.read_bytes() == path.read_bytes() and set(tmp_path.iterdir()) == {path, other}


def test_a_wrong_file_is_refused_in_one_line(tmp_path):
    path, policy = tmp_path / "hopper_1.safetensors", hopper_policy()
    write_policy(path, policy)
    with pytest.raises(UserError, match=f"{path}.*the policy inside is hopper_7"):
        read_policy(path)
    policy.weights["mean.bias"][0] = np.nan
    write_policy(path, policy)
    with pytest.raises(UserError, match=f"{path}.*NaN"):
        read_policy(path)
    os.truncate(path, 1000)
    with pytest.raises(UserError, match="not a policy file"):
        read_policy(path)


@pytest.mark.parametrize("name", sorted(ENVIRONMENTS))
def test_environments_are_as_registered(name):
    env = ENVIRONMENTS[name]()
    observation, _ = env.reset(seed=3)
    later = [env.step(env.action_space.low)[0] for _ in range(3)]
    again, _ = env.reset(seed=3)
    np.testing.assert_array_equal(observation, again)
    np.testing.assert_array_equal([env.step(env.action_space.low)[0] for _ in range(3)], later)
    policy = read_policy(next(path for path in SHIPPED if path.stem.rpartition("_")[0] == name))
    assert (observation.shape + env.action_space.shape) == policy.sizes
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    env.close()


def test_the_ants_directions_are_drawn_from_its_own_seed():
    """OGBench draws them from NumPy's global generator: at a reset and every 100 steps."""
    env, found = ENVIRONMENTS["ant-xy"](), []
    for disturbance in (0, 1):
        observation, _ = env.reset(seed=4)
        np.random.seed(disturbance)
        before = np.random.get_state()[1].copy()
        seen = [observation, *(env.step(np.zeros(8))[0] for _ in range(120))]
        np.testing.assert_array_equal(np.random.get_state()[1], before)
        found.append(np.array(seen)[:, -2:])
    np.testing.assert_array_equal(*found)
    assert np.flatnonzero(np.diff(found[0], axis=0).any(axis=1)).tolist() == [99]
    np.testing.assert_allclose(np.linalg.norm(found[0], axis=1), 1)


@pytest.mark.parametrize(
    "stochastic,returns",
    [(False, [191.496465325, 196.782992881, 200.200882166]), (True, [192.307295044, 193.911350420, 202.414501241])],
)
def test_episodes_of_a_card_stay_the_same(stochastic, returns):
    """The shipped cards were measured with these seeds; no episode depends on those beside it or before it."""
    policy = read_policy(experts.policy_path(experts.DEFAULT_EXPERTS_DIR, "hopper", 10_000))
    env = ENVIRONMENTS["hopper"]()
    alone = evaluate_policy(policy, 1, stochastic=stochastic, env=env)["mean"]
    found = evaluate_policy(policy, 3, stochastic=stochastic, env=env)
    assert [found[name] for name in ("min", "50%", "max")] == pytest.approx(returns, rel=1e-6)
    assert alone in (found["min"], found["50%"], found["max"])
    assert evaluate_policy(policy, 3, stochastic=stochastic) == found


def test_shipped_policies_are_small_and_there():
    files = list(experts.DEFAULT_EXPERTS_DIR.iterdir())
    assert sum(file.stat().st_size for file in files) <= MAX_SHIPPED_BYTES
    assert {path.stem.rpartition("_")[0] for path in SHIPPED} == set(ENVIRONMENTS)
    assert {file.stem for file in files} == {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_policies_have_true_cards(path):
    policy, card = read_policy(path), experts.read_card(path)
    assert path.stem == f"{policy.env}_{policy.step}" == f"{card['environment']}_{card['steps']}"
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {"algorithm", "recipe", "seed", "measured_with"} <= set(card)
    assert [card["returns"][kind]["episodes"] for kind in ("deterministic", "stochastic")] == [100, 100]
    assert sum(array.size for array in load_file(path).values()) < 100_000
