"""POGO's update in plain JAX: what XLA makes of the work of pogo_agent.py, for bench_pogo.py --jax.

The same as POGOAgent.update with its defaults: twin critics that bootstrap from actor 0 by target critics, the chain
of actors with `follow`, K samples a state, the fused solver's Sinkhorn schedule, Adam, Polyak averages. A test takes
one update of both from the same weights and noise. Nothing is logged and the learning rate stays: a little less work
than ours. n stands for a batch, D and A for the sizes of observations and actions.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.peers import JAX_WARMUP
from benchmarks.turns import Contestant
from pogo_agent import POGOConfig
from transport import _temperatures, box_diameter

BETAS, EPS = (0.9, 0.999), 1e-8  # of PyTorch's Adam
Net = list[tuple[Array, Array]]  # weight [in, out] and bias [out] of each layer


class Moments(NamedTuple):
    """Adam's running means of a gradient and of its square."""

    first: Net | list[Net]
    second: Net | list[Net]


class State(NamedTuple):
    """What an update changes. actor_target takes part in the average alone, as with `td_actor online`."""

    critics: list[Net]  # two
    critic_targets: list[Net]
    critic_moments: Moments
    actors: list[Net]
    actor_target: Net
    actor_moments: list[Moments]
    step: Array  # updates so far, 0-d


class Noise(NamedTuple):
    """Standard normal numbers of one update."""

    target_action: Array  # [n, A], added to the target's action
    target_z: Array  # [n, A], of actor 0 in the next states
    z: list[Array]  # of each actor: [n, A] of the first, [n, K, A] of the others
    reference_z: list[Array]  # [n, K, A], of the actor before each but the first


def init_state(key: Array, observation_dim: int, action_dim: int, actors: int, hidden_dim: int = 256) -> State:
    """Weights as PyTorch's nn.Linear draws them; all actors alike."""
    keys, inputs = jax.random.split(key, 3), observation_dim + action_dim
    critics = [_init_net(own, (inputs, hidden_dim, hidden_dim, 1)) for own in keys[:2]]
    actor = _init_net(keys[2], (inputs, hidden_dim, hidden_dim, action_dim))
    return start(critics, [actor] * actors)


def start(critics: list[Net], actors: list[Net]) -> State:
    """The state before the first update; target networks are copies, and nothing shares memory."""
    moments = [_zeros(actor) for actor in actors]
    state = State(critics, critics, _zeros(critics), actors, actors[0], moments, jnp.zeros(()))
    return jax.tree.map(lambda value: jnp.array(value, copy=True), state)


def _init_net(key: Array, widths: Sequence[int]) -> Net:
    net = []
    for rows, columns in zip(widths, widths[1:], strict=False):
        key, for_weight, for_bias = jax.random.split(key, 3)
        bound = rows**-0.5
        weight = jax.random.uniform(for_weight, (rows, columns), minval=-bound, maxval=bound)
        net.append((weight, jax.random.uniform(for_bias, (columns,), minval=-bound, maxval=bound)))
    return net


def _zeros(net: Net | list[Net]) -> Moments:
    return Moments(jax.tree.map(jnp.zeros_like, net), jax.tree.map(jnp.zeros_like, net))


def mlp(net: Net, x: Array) -> Array:
    """[n, in] -> [n, out]."""
    for weight, bias in net[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = net[-1]
    return x @ weight + bias


def act(actor: Net, observations: Array, z: Array) -> Array:
    """Actions of observations [n, D] under z [n, A] or [n, K, A], in [-1, 1]."""
    if z.ndim == 3:
        observations = jnp.broadcast_to(observations[:, None], (*z.shape[:2], observations.shape[1]))
    inputs = jnp.concatenate([observations, z], -1)
    return jnp.tanh(mlp(actor, inputs.reshape(-1, inputs.shape[-1]))).reshape(z.shape)


def q(critic: Net, observations: Array, actions: Array) -> Array:
    """[n, D], [n, A] -> [n]."""
    return mlp(critic, jnp.concatenate([observations, actions], -1))[:, 0]


def sinkhorn(x: Array, y: Array, blur: float) -> tuple[Array, Array]:
    """Debiased Sinkhorn of clouds [n, K, A] in [-1, 1]: [n], and its gradient by x [n, K, A].

    Layout, schedule and gradient are those of transport._FusedSinkhorn.
    """
    schedule = _temperatures(blur, box_diameter(1.0, x.shape[2]))
    z = jnp.stack([x.transpose(2, 1, 0), y.transpose(2, 1, 0)], axis=2)  # [A, K, 2, n]
    cost = ((z[:, :, None, :, None] - z[:, None, :, None]) ** 2).sum(0) / 2  # [j, i, h, g, n]

    def total(potential: Array, temperature: float) -> tuple[Array, Array]:
        scores = potential.transpose(1, 0, 3, 2, 4) - cost / temperature
        log_shares = jax.nn.log_softmax(scores, 0)
        return (scores - log_shares)[:1], log_shares

    potential = -total(jnp.zeros((1, 1, 1, 1, 1)), schedule[0])[0]
    for now, after in zip(schedule, schedule[1:] + schedule[-1:], strict=True):
        potential = (potential - total(potential, now)[0]) * (now / (2 * after))
    last, log_shares = total(potential, schedule[-1])
    shares = jnp.exp(jnp.maximum(log_shares[:, :, :, 0], -50))  # [j, i, h, n]
    means = (shares * z[:, :, None]).sum(1)  # [A, i, h, n]
    gradient = (means[:, :, 0] - means[:, :, 1]).transpose(2, 1, 0) / x.shape[1]
    last = last.sum((0, 1))
    return (last[0, 0] + last[1, 1] - last[0, 1] - last[1, 0]) * (schedule[-1] / x.shape[1]), gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mean_distance(x: Array, y: Array, blur: float) -> Array:
    """The mean of `sinkhorn` over the batch, 0-d, differentiable by x."""
    return sinkhorn(x, y, blur)[0].mean()


def _distance_forward(x: Array, y: Array, blur: float) -> tuple[Array, Array]:
    value, gradient = sinkhorn(x, y, blur)
    return value.mean(), gradient / len(gradient)


mean_distance.defvjp(_distance_forward, lambda blur, gradient, slope: (slope * gradient, None))


def adam(net: Net | list[Net], slope: Net | list[Net], moments: Moments, step: Array, lr: float) -> tuple:
    """The net after a step of Adam, the first being step 1, and its moments."""
    first = jax.tree.map(lambda m, g: BETAS[0] * m + (1 - BETAS[0]) * g, moments.first, slope)
    second = jax.tree.map(lambda v, g: BETAS[1] * v + (1 - BETAS[1]) * g * g, moments.second, slope)
    sizes = 1 - BETAS[0] ** step, 1 - BETAS[1] ** step
    net = jax.tree.map(lambda p, m, v: p - lr * (m / sizes[0]) / (jnp.sqrt(v / sizes[1]) + EPS), net, first, second)
    return net, Moments(first, second)


def update(config: POGOConfig, state: State, batch: dict[str, Array], noise: Noise) -> State:
    """One step: critics, the actors in order, the averages. batch: as POGOAgent.update takes it."""
    step, observations = state.step + 1, batch["observations"]
    target = _target_value(config, state, batch, noise)

    def critic_loss(critics: list[Net]) -> Array:
        return sum(((q(critic, observations, batch["actions"]) - target) ** 2).mean() for critic in critics)

    slope = jax.grad(critic_loss)(state.critics)
    critics, critic_moments = adam(state.critics, slope, state.critic_moments, step, config.lr)
    actors, moments, change = [], [], None
    for number, before in enumerate(state.actors):
        actor = before if change is None else jax.tree.map(jnp.add, before, change)  # follow

        def actor_loss(actor: Net, number: int = number) -> Array:
            return _actor_loss(config, number, actor, actors, critics[0], batch, noise)

        actor, own = adam(actor, jax.grad(actor_loss)(actor), state.actor_moments[number], step, config.lr)
        change = jax.tree.map(jnp.subtract, actor, before)
        actors.append(actor)
        moments.append(own)

    def average(slow: Net | list[Net], fast: Net | list[Net]) -> Net | list[Net]:
        return jax.tree.map(lambda a, b: a + config.tau * (b - a), slow, fast)

    averages = average(state.critic_targets, critics), average(state.actor_target, actors[0])
    return State(critics, averages[0], critic_moments, actors, averages[1], moments, step)


def _target_value(config: POGOConfig, state: State, batch: dict[str, Array], noise: Noise) -> Array:
    """y [n]."""
    following = batch["next_observations"]
    added = jnp.clip(config.policy_noise * noise.target_action, -config.noise_clip, config.noise_clip)
    actions = jnp.clip(act(state.actors[0], following, noise.target_z) + added, -1, 1)
    value = jnp.minimum(*(q(critic, following, actions) for critic in state.critic_targets))
    return batch["rewards"] + config.discount * (1 - batch["terminated"]) * value


def _actor_loss(
    config: POGOConfig,
    number: int,
    actor: Net,
    before: list[Net],
    critic: Net,
    batch: dict[str, Array],
    noise: Noise,
) -> Array:
    """L_i, 0-d, of actor `number`; `before` are the actors before it, already updated."""
    observations = batch["observations"]
    actions = act(actor, observations, noise.z[number])
    if number == 0:
        distance = ((actions - batch["actions"]) ** 2).mean()
    else:
        reference = act(before[number - 1], observations, noise.reference_z[number - 1])
        distance = mean_distance(actions, jax.lax.stop_gradient(reference), config.sinkhorn_blur)
        actions = actions[:, 0]
    value = q(critic, observations, actions)
    return config.w2_weights[number] * distance - value.mean() / jax.lax.stop_gradient(jnp.abs(value).mean())


def draw_noise(key: Array, config: POGOConfig, n: int, action_dim: int) -> Noise:
    """Everything that one update draws, but for the rows of the batch."""
    later = len(config.w2_weights) - 1
    first, second, third, *keys = jax.random.split(key, 3 + 2 * later)
    clouds = [jax.random.normal(own, (n, config.sinkhorn_K, action_dim)) for own in keys]
    single = [jax.random.normal(own, (n, action_dim)) for own in (first, second, third)]
    return Noise(single[0], single[1], [single[2], *clouds[:later]], clouds[later:])


def make_contestant(
    config: POGOConfig, arrays: dict[str, np.ndarray], batch_size: int = 256, updates: int = 10
) -> Contestant:
    """A jitted scan of updates, each on a batch of its own; the state's buffers are donated.

    Args:
        config: settings; those that `update` does not read must be at their defaults.
        arrays: observations, next_observations [N, D], actions [N, A], rewards, terminated [N] float32.
        batch_size: transitions in an update.
        updates: in a call.
    """
    data = {name: jnp.asarray(value) for name, value in arrays.items()}
    rows, action_dim = data["actions"].shape
    first = init_state(
        jax.random.PRNGKey(0), data["observations"].shape[1], action_dim, len(config.w2_weights), config.hidden_dim
    )

    def one(carry: tuple[State, Array], _: None) -> tuple[tuple[State, Array], None]:
        state, key = carry
        key, for_rows, for_noise = jax.random.split(key, 3)
        drawn = jax.random.randint(for_rows, (batch_size,), 0, rows)
        batch = {name: value[drawn] for name, value in data.items()}
        return (update(config, state, batch, draw_noise(for_noise, config, batch_size, action_dim)), key), None

    scan = jax.jit(lambda carry: jax.lax.scan(one, carry, None, updates)[0], donate_argnums=0)
    kept = [(first, jax.random.PRNGKey(1))]

    def step() -> None:
        kept[0] = scan(kept[0])

    return Contestant(step, updates, lambda: jax.block_until_ready(kept[0]), JAX_WARMUP)
