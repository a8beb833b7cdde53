"""Other people's files as modules, from a clone that the user names, and one update of each JAX file.

    git clone https://github.com/corl-team/CORL
    git clone https://github.com/nissymori/JAX-CORL
    git clone https://github.com/EmptyJackson/unifloral

Nothing of theirs is copied: a file is imported where it lies. They import gym, d4rl, wandb and pyrallis, which an
update does not use: empty modules stand for those that are missing. JAX computes on one thread of the CPU.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.turns import Contestant
from utils import UserError

UNUSED = ("gym", "d4rl", "wandb", "pyrallis")  # what peers import and an update does not need
JAX_CORL = {"td3_bc": "TD3BC", "iql": "IQL", "awac": "AWAC", "cql": "CQL"}  # class of each algorithm
UNIFLORAL = ("td3_bc", "iql", "cql", "sac_n", "edac")
JAX_WARMUP = 2  # calls that may compile: some files compile again at the second
# Updates in a scan: enough that the call itself costs nothing, few enough that a turn is not one call.
SCAN = {"td3_bc": 50, "iql": 50, "cql": 5, "sac_n": 10, "edac": 5}
# Widths of the hidden layers where JAX-CORL's own are not the three of 256 that ours and CORL's have.
WIDTHS = {
    "awac": {"actor_hidden_dims": (256,) * 3, "critic_hidden_dims": (256,) * 3},
    "cql": {"hidden_dims": (256,) * 3},
}


class Anything(types.ModuleType):
    """A module that has whatever is asked of it, as a decorator or type that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__call__": lambda self, function: function})


def load_file(flag: str, folder: str, file: str) -> types.ModuleType:
    """One file of a peer as a module; its changes to the environment are undone.

    Args:
        flag: the flag that named the clone, for messages.
        folder: the clone.
        file: path inside it.

    Raises:
        UserError: the file is not there, or cannot be imported.
    """
    path = Path(folder) / file
    if not path.is_file():
        raise UserError(f"{flag} {folder}: no {file} there; give a clone of the repository")
    missing = {name: Anything(name) for name in UNUSED if importlib.util.find_spec(name) is None}
    sys.modules.update(missing)
    spec = importlib.util.spec_from_file_location(f"peer_{flag.strip('-')}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    with mock.patch.object(sys, "argv", [str(path)]), mock.patch.dict(os.environ):
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            raise UserError(f"{flag} {folder}: {file} needs {error.name}; see requirements/benchmarks.txt") from None
        finally:
            for name in missing:
                del sys.modules[name]
    return module


def start_jax() -> types.ModuleType:
    """The jax module, on one thread of the CPU. UserError where it is not installed."""
    if importlib.util.find_spec("jax") is None:
        raise UserError("JAX is not installed: pip install -r requirements/benchmarks.txt, or leave its peers out")
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    with mock.patch.dict(os.environ, {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}):
        import jax

        jax.numpy.zeros(1).block_until_ready()  # reads the environment, once in a process
    return jax


def jax_corl(folder: str, name: str, arrays: dict[str, np.ndarray], layer_norm: bool) -> Contestant:
    """JAX-CORL's own `update_n_times`, with our widths; `layer_norm=False` takes the layer norm out.

    Args:
        folder: the clone.
        name: of the algorithm, one of JAX_CORL.
        arrays: observations, next_observations [N, D], actions [N, A], rewards, dones [N] float32.
        layer_norm: whether networks are as shipped.
    """
    jax = start_jax()
    short, kind = name.replace("_", ""), JAX_CORL[name]
    module = load_file("--jax_corl", folder, f"algos/{short}.py")
    if not layer_norm:
        own = module.MLP
        module.MLP = lambda *dims, layer_norm=False, add_layer_norm=False, **more: own(*dims, **more)
    settings = getattr(module, f"{kind}Config")
    changed = dict(WIDTHS.get(name, {}))
    if name == "cql":
        changed["action_dim"] = arrays["actions"].shape[1]
    config = settings.model_construct(**(settings().model_dump() | changed))
    module.config = config  # some functions read the global
    fields = {**arrays, "dones_float": arrays["dones"]}
    data = module.Transition(**{field: jax.numpy.asarray(fields[field]) for field in module.Transition._fields})
    key = jax.random.PRNGKey(0)
    state = getattr(module, f"create_{short}_train_state")(key, data.observations[0], data.actions[0], config)
    static = (3, 4) if name == "cql" else (3,)
    update, kept = jax.jit(getattr(module, kind)().update_n_times, static_argnums=static), [key, state]

    def step() -> None:
        kept[0], drawn = jax.random.split(kept[0])
        kept[1], _ = update(kept[1], data, drawn, config)

    def wait() -> None:
        jax.block_until_ready([leaf for leaf in jax.tree.leaves(kept[1]) if isinstance(leaf, jax.Array)])

    return Contestant(step, config.n_jitted_updates, wait, JAX_WARMUP)


def unifloral(folder: str, name: str, arrays: dict[str, np.ndarray]) -> Contestant:
    """A jitted scan of unifloral's train step. Of TD3+BC, a step holds two critic updates and one of the actor: it
    counts as two updates, as ours have one critic update each and the actor's at every second."""
    jax = start_jax()
    module = load_file("--unifloral", folder, f"algorithms/{name}.py")
    names = {"obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations"}
    data = module.Transition(
        done=jax.numpy.asarray(arrays["dones"]),
        **{field: jax.numpy.asarray(arrays[own]) for field, own in names.items()},
    )
    args, key = module.Args(), jax.random.PRNGKey(0)
    networks, initial = _unifloral_networks(module, name, args, data)
    inputs = (jax.numpy.zeros(data.obs.shape[1]), jax.numpy.zeros(data.action.shape[1]))
    fields = {field: module.create_train_state(args, key, networks[net], inputs[:n]) for field, net, n in initial}
    train = module.make_train_step(args, *(network.apply for network in networks.values()), data)
    scan = jax.jit(lambda carry: jax.lax.scan(train, carry, None, SCAN[name])[0])
    kept = [(key, module.AgentTrainState(**fields))]

    def step() -> None:
        kept[0] = scan(kept[0])

    per_step = args.num_critic_updates_per_step if name == "td3_bc" else 1
    return Contestant(step, SCAN[name] * per_step, lambda: jax.block_until_ready(kept[0]), JAX_WARMUP)


def _unifloral_networks(module: Any, name: str, args: Any, data: Any) -> tuple[dict[str, Any], list[tuple]]:
    """Networks in the order of `make_train_step`, and of each state its field, its network and how many inputs."""
    actions, moments = data.action.shape[1], (data.obs.mean(0), data.obs.std(0))
    if name == "td3_bc":
        networks = {"actor": module.DeterministicTanhActor(actions, *moments), "q": module.DualQNetwork(*moments)}
        actors = [("actor", "actor", 1), ("actor_target", "actor", 1)]
        return networks, [*actors, ("dual_q", "q", 2), ("dual_q_target", "q", 2)]
    if name == "iql":
        networks = {"actor": module.TanhGaussianActor(actions, *moments), "q": module.DualQNetwork(*moments)}
        networks["value"] = module.StateValueFunction(*moments)
        return networks, [("actor", "actor", 1), ("dual_q", "q", 2), ("dual_q_target", "q", 2), ("value", "value", 1)]
    networks = {"actor": module.TanhGaussianActor(actions), "q": module.VectorQ(args.num_critics)}
    networks["alpha"] = module.EntropyCoef()
    return networks, [("actor", "actor", 1), ("vec_q", "q", 2), ("vec_q_target", "q", 2), ("alpha", "alpha", 0)]
