"""What a row holds: numbers, flags, and whether rewards and actions stand in the row that they belong to."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator

import numpy as np

import dmc_utils
from benchmark_data.check_files import EPISODE_NAME, FAULT, Damaged, Data, Finding
from benchmark_data.check_moves import SAMPLE, moves_of, successors, usual_length
from benchmark_data.check_robots import RUNNER_STEPS

SHIFTS = (0, -2, -1, 1, 2)  # rows by which rewards and actions are tried; 0 first, so that it wins a tie


def check_finite(data: Data) -> Iterator[Finding]:
    """NaN and infinity."""
    for name, array in data.columns.items():
        if array.dtype.kind == "f":
            yield from _not_finite(data, name, array)


def _not_finite(data: Data, name: str, array: np.ndarray) -> Iterator[Finding]:
    found: dict[str, list[np.ndarray]] = {}
    for rows in data.blocks(len(array)):
        block = array[rows].reshape(rows.stop - rows.start, -1)
        if not np.isfinite(block).all():
            for word, bad in (("NaN", np.isnan(block)), ("infinity", np.isinf(block))):
                found.setdefault(word, []).append(rows.start + np.flatnonzero(bad.any(axis=1)))
    for word, rows in found.items():
        bad = np.concatenate(rows)
        if len(bad):
            yield data.fault(f"{name} holds {word}", bad)


def check_actions(data: Data) -> Iterator[Finding]:
    """Actions outside [-1, 1].

    Every recipe clips or squashes: the largest float32 of a squashed action is 1 exactly. As much as 1e-5 above it is
    rounding of actions that were rescaled.
    """
    actions = data.columns.get("actions")
    if actions is None:
        return
    beyond = np.concatenate([np.abs(actions[rows]).max(axis=1) > 1 + 1e-5 for rows in data.blocks()])
    rows = np.flatnonzero(beyond)
    if len(rows):
        largest = np.abs(actions[rows]).max()
        yield data.fault(f"actions outside [-1, 1], up to {largest:.6g}", rows)


def check_ends(data: Data) -> Iterator[Finding]:
    """Flags that are there, and the last row."""
    if data.layout == "walker" or "terminals" not in data.columns:
        return
    if not data.flagged.any():
        # Early maze2d files are one walk without any flag.
        severity = data.note if data.robot_key == "d4rl maze2d" else data.fault
        yield severity("no episode end is flagged: all rows are one episode")
        return
    both = [data.columns[name] == 1 for name in ("terminals", "timeouts") if name in data.columns]
    rows = np.flatnonzero(both[0] & both[1]) if len(both) == 2 else []
    if len(rows) and data.robot_key != "d4rl antmaze":
        yield data.note(
            "terminals and timeouts are both set; loaders that bootstrap through timeouts differ here", rows
        )
    if not data.flagged[-1]:
        what = "the last row does not end an episode"
        if data.layout == "d4rl":
            yield data.note(f"{what}, as in official files, which are cut at a number of rows")
        else:
            yield data.fault(f"{what}: the file was cut, or its last flag is missing")


def check_lengths(data: Data) -> Iterator[Finding]:
    """Rows an episode, against the recipe or the time limit."""
    lengths = data.lengths
    if data.layout == "walker":
        yield from _walker_lengths(data)
        return
    usual = usual_length(data)
    if data.layout == "ogbench":
        odd = np.flatnonzero(lengths != usual) if usual else []
        if len(odd):
            shown = ", ".join(f"{length:,}" for length in sorted({int(lengths[episode]) for episode in odd})[:6])
            rule = f"{usual:,}, the recipe's" if data.recipe_rows else f"{usual:,} like the others"
            severity = data.fault if data.recipe_rows else data.note
            yield severity(f"episode length: {shown} rows, not {rule}", data.starts[odd])
        short = np.flatnonzero(lengths < 2)
        if len(short):
            yield data.fault("episodes of one row hold no transition; loaders refuse them", data.starts[short])
    elif data.robot and data.robot.reward:
        long = np.flatnonzero(lengths > RUNNER_STEPS)
        if len(long):
            most = f"up to {lengths.max():,} rows"
            yield data.fault(f"episode length: {most}, beyond the time limit of {RUNNER_STEPS}", data.starts[long])
        if "timeouts" in data.columns:
            timed_out = data.columns["timeouts"][np.append(data.starts[1:], data.rows) - 1] == 1
            early = np.flatnonzero(timed_out & (lengths < RUNNER_STEPS))
            if len(early):
                ends = data.starts[early] + lengths[early] - 1
                yield data.note(f"timeouts before the time limit of {RUNNER_STEPS}: episodes that were cut", ends)


def _walker_lengths(data: Data) -> Iterator[Finding]:
    for episode, length in enumerate(data.lengths):
        named = int(EPISODE_NAME.match(data.files[episode])[2]) if EPISODE_NAME.match(data.files[episode]) else None
        if length != dmc_utils.EPISODE_STEPS + 1:
            yield Finding(FAULT, f"episode length: {length:,} rows, not {data.recipe_rows:,}", data.files[episode])
        elif named not in (None, length - 1):
            yield Finding(FAULT, f"the file name says {named:,} steps, it has {length - 1:,}", data.files[episode])


def check_falls(data: Data) -> Iterator[Finding]:
    """terminals where the robot stands, timeouts where it has fallen."""
    robot, following = data.robot, successors(data)
    if robot is None or robot.reward is None or "terminals" not in data.columns:
        return
    terminals = np.flatnonzero(data.columns["terminals"] == 1)
    full = data.lengths[np.searchsorted(data.starts, terminals, side="right") - 1] == RUNNER_STEPS
    if robot.fallen is None:
        limits = terminals[full] if "timeouts" in data.columns else terminals[:0]
        if len(limits):
            yield data.fault(f"{robot.name} never terminates: a time limit stands in terminals, not timeouts", limits)
        if len(terminals) > len(limits):
            # Official files have one such flag each (issue 107 of D4RL), though nothing ends there.
            severity = data.note if len(terminals) == 1 else data.fault
            yield severity(f"terminals is set, but {robot.name} never terminates", np.setdiff1d(terminals, limits))
        return
    if following is None:
        return
    # Diverging velocities end an episode too; the observation shows no more of them than that they are clipped at 10.
    after = following[terminals]
    clipped = np.abs(after[:, robot.dims[0] // 2 :]).max(axis=1) > 9.999
    standing = ~robot.fallen(after) & (full | ~clipped)
    if standing.any():
        yield data.fault(
            f"terminals is set where {robot.name} stands: a time limit in terminals, or a flag in the wrong row",
            terminals[standing],
        )
    if "timeouts" in data.columns:
        lengths = data.lengths
        early = np.flatnonzero((data.columns["timeouts"] == 1) & ~(data.columns["terminals"] == 1))
        early = early[lengths[np.searchsorted(data.starts, early, side="right") - 1] < RUNNER_STEPS]
        fallen = early[robot.fallen(following[early])]
        if len(fallen):
            yield data.fault(f"timeouts is set where {robot.name} has fallen: this end belongs in terminals", fallen)


def check_walls(data: Data) -> Iterator[Finding]:
    """Positions inside the maze's walls. Bodies touch walls; no centre of good data lies in one."""
    if data.maze is None or data.robot is None:
        return
    bad = []
    for rows in data.blocks():
        xy = data.columns["observations"][rows, :2].astype(np.float64)
        finite = np.isfinite(xy).all(axis=1)
        xy = np.clip(xy[finite], -1e6, 1e6)
        inside = np.ones(len(xy), bool)
        for offset in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)):
            inside &= ~data.maze.is_free(xy + offset)
        bad.append(rows.start + np.flatnonzero(finite)[inside])
    bad = np.concatenate(bad)
    if len(bad):
        yield data.fault("positions inside a wall or outside the maze, by more than 0.5", bad)


def check_repeats(data: Data) -> Iterator[Finding]:
    """Identical episodes, rows that stand still, columns that never change."""
    observations, actions = data.columns["observations"], data.columns.get("actions")
    seen: dict[bytes, int] = {}
    copies = []
    for episode, (start, length) in enumerate(zip(data.starts, data.lengths, strict=True)):
        digest = hashlib.blake2b(np.ascontiguousarray(observations[start : start + length]), digest_size=16).digest()
        if seen.setdefault(digest, episode) != episode and length > 1:
            copies.append(start)
    if copies:
        yield data.note("episodes whose observations are those of an earlier one", copies)
    if actions is not None:
        still = []
        for rows in data.blocks(data.rows - 1):
            later = slice(rows.start + 1, rows.stop + 1)
            same = (observations[rows] == observations[later]).all(1) & (actions[rows] == actions[later]).all(1)
            still.append(rows.start + np.flatnonzero(same & ~data.flagged[rows]))
        still = np.concatenate(still) if still else []
        if len(still):
            yield data.note("rows that repeat the row before, observation and action", np.array(still) + 1)
    for name, array in (("observations", observations), ("actions", actions)):
        if array is not None and data.rows > 1:
            constant = np.flatnonzero(array.min(axis=0) == array.max(axis=0))
            if len(constant):
                yield data.note(f"{name} columns that never change: {', '.join(map(str, constant[:20]))}")


def check_extra(data: Data) -> Iterator[Finding]:
    """qpos, qvel, infos/*: readable, finite, as many rows. They are as large as the rest, so one at a time."""
    for key, stored in data.extra.items():
        standard = key in ("qpos", "qvel") or key.startswith("infos/")
        if not standard:
            yield data.note(f"an array {key!r} {stored.shape}, which the layout does not know")
            continue
        try:
            array = stored.read()
        except Damaged as error:
            yield data.fault(f"{key} {error}")
            continue
        if array.ndim == 0 or len(array) != data.rows:
            yield data.fault(f"arrays have different numbers of rows: {key} {array.shape}, observations {data.rows:,}")
            continue
        if array.dtype.kind == "f":
            yield from _not_finite(data, key, array)
        if data.layout == "ogbench" and array.dtype != np.float32:
            yield data.fault(
                f"{key} is {array.dtype}, not float32, as the benchmark writes it: another program wrote this file"
            )
        if key == "qpos" and data.robot and data.robot.maze and array.ndim == 2 and array.shape[1] >= 2:
            apart = np.abs(array[:, :2] - data.columns["observations"][:, :2]).max(axis=1) > 1e-3
            if apart.any():
                yield data.fault("qpos and observations of a row are not at the same position", np.flatnonzero(apart))
        if key in ("infos/qpos", "infos/qvel") and data.robot and data.robot.reward:
            yield from _check_states(data, key, array)


def _check_states(data: Data, key: str, array: np.ndarray) -> Iterator[Finding]:
    """A runner's infos/qpos or infos/qvel: the observation is both, without x, velocities clipped."""
    half, limit = data.robot.dims[0] // 2, data.robot.velocity_limit
    if array.shape[1:] != (half + 1,):
        yield data.fault(f"wrong shape: {key} is {array.shape}, {data.robot.name} has {half + 1} numbers a row")
        return
    positions = key == "infos/qpos"
    state = array[:, 1:] if positions else array
    observed = data.columns["observations"][:, :half] if positions else data.columns["observations"][:, half:]

    def differ(rows: slice, shift: int = 0) -> np.ndarray:
        there = state[rows.start + shift : rows.stop + shift].astype(np.float64)
        there = there if positions else np.clip(there, -limit, limit)
        return (np.abs(observed[rows] - there) > 1e-4 + 1e-4 * np.abs(there)).any(axis=1)  # float32 rounding at most

    apart = np.flatnonzero(np.concatenate([differ(rows) for rows in data.blocks()]))
    if not len(apart):
        return
    severity = data.note if data.from_rlkit else data.fault  # D4RL's replay files before v2 are known for it
    inner = slice(1, min(data.rows - 1, SAMPLE))
    shift = next((shift for shift in (1, -1) if data.rows > 2 and differ(inner, shift).mean() < 0.5), 0)
    if len(apart) > data.rows / 2 and shift:
        yield severity(f"shifted {key}: the state of a row stands {_rows_off(shift)}")
    else:
        yield severity(f"{key} and observations of a row are not one state", apart)


# ----------------------------------------------------------------------------------------------------------------
# Rewards and actions of runners and mazes
# ----------------------------------------------------------------------------------------------------------------


def check_runner_rewards(data: Data) -> Iterator[Finding]:
    """Rewards of hopper, halfcheetah and walker2d against their velocity.

    The reward is healthy - cost |a|^2 + (x' - x) / dt, and the mean of the velocities before and after the step is
    close to the last term: in the mean over an episode it departs by 0.002 (hopper) to 0.16 (halfcheetah) at the right
    row, and one row off by twice (halfcheetah) to sixty times that. Episodes are judged one by one for rows that are
    shifted, then all together for a scale or an offset, then stretches and single rows for other values.
    """
    if (
        data.robot is None
        or data.robot.reward is None
        or "rewards" not in data.columns
        or "actions" not in data.columns
    ):
        return
    expected, rewards = _expected_rewards(data), data.columns["rewards"].astype(np.float64)
    rows = _inner_rows(data)  # the same for every shift: a wrong reward in an episode's last row then favours none
    episodes = np.searchsorted(data.starts, rows, side="right") - 1
    errors = []
    for shift in SHIFTS:
        error = np.abs(rewards[rows + shift] - expected[rows])
        known = np.isfinite(error)
        totals, counts = (
            np.bincount(episodes, values, len(data.starts)) for values in (np.where(known, error, 0.0), known)
        )
        errors.append(np.where((data.lengths >= 20) & (counts > 0), totals / np.maximum(counts, 1), np.nan))
    table = np.array(errors)
    judged = np.flatnonzero(np.isfinite(table).all(axis=0))
    # Below 1e-3 the robot stands still and every row has the same reward.
    best = np.array(SHIFTS)[np.argmin(table[:, judged], axis=0)]
    wrong = judged[(best != 0) & (table[:, judged].min(axis=0) < 0.6 * table[0, judged]) & (table[0, judged] > 1e-3)]
    if len(wrong):
        shift = int(np.median(best[np.isin(judged, wrong)]))
        yield data.fault(
            f"shifted rewards: the reward of a step stands {_rows_off(shift)}; the velocity fits it there and not in "
            f"its own row, in {len(wrong):,} of {len(judged):,} episodes",
            data.starts[wrong[:1]],
        )
        return
    yield from _changed_rewards(data, expected, rewards)


def _rows_off(shift: int) -> str:
    count = "one row" if abs(shift) == 1 else f"{abs(shift)} rows"
    return f"{count} {'late' if shift > 0 else 'early'}"


def _expected_rewards(data: Data) -> np.ndarray:
    """What each step's reward is about, by the motion and the action: [N] float64, nan where the motion is unknown."""
    law, observations, following = data.robot.reward, data.columns["observations"], successors(data)
    moves = moves_of(data)
    before = observations[:, law.velocity].astype(np.float64)
    if following is not None:
        after = following[:, law.velocity].astype(np.float64)
        after[moves.inside] = np.nan
    else:
        after = np.append(before[1:], np.nan)
        after[data.flagged] = np.nan
        if moves and not moves.misaligned:
            after[:-1][moves.breaks] = np.nan
    expected = (before + after) / 2 + law.healthy
    for rows in data.blocks():
        expected[rows] -= law.control_cost * np.square(data.columns["actions"][rows].astype(np.float64)).sum(axis=1)
    return expected


def _inner_rows(data: Data) -> np.ndarray:
    """Rows whose neighbours, as far as SHIFTS go, lie in the same episode."""
    episode = np.repeat(np.arange(len(data.starts)), data.lengths)
    margin = max(SHIFTS)
    return margin + np.flatnonzero(episode[2 * margin :] == episode[: -2 * margin])


def _rows_with(data: Data, shift: int) -> np.ndarray:
    """Rows t whose row t + shift is in the same episode."""
    episode = np.repeat(np.arange(len(data.starts)), data.lengths)
    rows = np.arange(max(0, -shift), data.rows - max(0, shift))
    return rows[episode[rows] == episode[rows + shift]]


def _changed_rewards(data: Data, expected: np.ndarray, rewards: np.ndarray) -> Iterator[Finding]:
    """Rewards that are scaled or offset throughout, wrong in some rows, or have nothing to do with the motion."""
    known = np.isfinite(expected) & np.isfinite(rewards)
    if known.sum() < 100 or expected[known].std() < 0.05:  # too little, or it hardly moves
        return
    law, off = data.robot.reward, _off_rows(data, rewards - expected)
    unlike = rewards[known].std() < 1e-6 or np.corrcoef(expected[known], rewards[known])[0, 1] < 0.6  # good data: 0.98
    if unlike and off[known].mean() > 0.3:
        yield data.fault("rewards do not go with the robot's velocity, which they are made of: shuffled or replaced")
        return
    scale = _scale(expected[known], rewards[known], law.drift)
    offset = np.median((rewards - scale * expected)[known])
    scaled = _off_rows(data, (rewards - offset) / scale - expected)
    # Wrong values in some rows pull at the scale too: it must explain what is off, if much is.
    if abs(scale - 1) > law.scale and (scaled.sum() < off.sum() / 2 or off.mean() < 0.01):
        besides = f" and lie {offset:+.3g} off them besides" if abs(offset) > 0.1 * scale else ""
        yield data.fault(f"rewards are scaled by about {scale:.3g} against the environment's{besides}")
        off = scaled
    else:
        rest = known if off[known].mean() > 0.5 else known & ~off
        offset = np.median((rewards - expected)[rest])
        if abs(offset) > 0.025:  # good data: 0.006 at most
            yield data.fault(f"offset rewards: they lie {offset:+.3g} off the environment's in every row")
            off = _off_rows(data, rewards - offset - expected)
    last = np.append(data.starts[1:], data.rows) - 1
    alone = last[off[last] & ~off[last - 1]]
    for wrong, which in ((alone, "in episodes' last rows"), (np.setdiff1d(np.flatnonzero(off), alone), "in some rows")):
        if len(wrong):
            zero = "; they are 0" if (rewards[wrong] == 0).mean() > 0.9 else ""
            yield data.fault(f"rewards {which} are not what the robot's motion gives{zero}", wrong)


def _scale(expected: np.ndarray, rewards: np.ndarray, drift: float) -> float:
    """By how much faster rewards grow than expected; 1 where too little varies to tell.

    The median of slopes between means of 20 rows (Theil 1950, Sen 1968), in which the departures of rows cancel.
    """
    blocks = len(rewards) // 20
    expected, rewards = (values[: 20 * blocks].reshape(blocks, 20).mean(axis=1) for values in (expected, rewards))
    if blocks < 10 or expected.std() < drift:
        return 1.0
    step = blocks // 1000 + 1
    expected, rewards = expected[::step], rewards[::step]
    one, other = np.triu_indices(len(expected), 1)
    apart = expected[one] != expected[other]
    slopes = (rewards[one] - rewards[other])[apart] / (expected[one] - expected[other])[apart]
    return max(float(np.median(slopes)), 1e-9)


def _off_rows(data: Data, departure: np.ndarray) -> np.ndarray:
    """Rows [N] bool whose reward departs from the motion's by more than a robot's can.

    departure: [N], nan where unknown. A row alone, by its own departure; the last rows of episodes, and 20 rows of an
    episode, also by their mean, which good data keep much smaller.
    """
    law, last = data.robot.reward, np.append(data.starts[1:], data.rows) - 1
    off = np.abs(departure) > law.slack
    ends = np.abs(departure[last])
    known_ends = np.isfinite(ends)
    if known_ends.sum() >= 5 and ends[known_ends].mean() > law.slack / 4:  # good data: a twelfth
        off[last[ends > law.slack / 4]] = True
    known = np.isfinite(departure) & ~off
    totals, counts = (np.cumsum(np.insert(values, 0, 0)) for values in (np.where(known, departure, 0.0), known))
    episode = np.repeat(np.arange(len(data.starts)), data.lengths)
    totals, counts = totals[20:] - totals[:-20], counts[20:] - counts[:-20]  # of rows t to t + 19
    drifts = (episode[19:] == episode[: len(episode) - 19]) & (counts >= 10) & (np.abs(totals) > law.drift * counts)
    ahead = np.cumsum(np.concatenate([[0], drifts, np.zeros(19, int)]))
    first = np.maximum(np.arange(data.rows) - 19, 0)
    covered = ahead[1 : data.rows + 1] > ahead[first]  # some drifting stretch begins in the 20 rows up to this one
    return off | covered & (np.abs(departure) > law.drift)


def check_goal_rewards(data: Data) -> Iterator[Finding]:
    """Sparse rewards of D4RL's mazes: 1 within 0.5 of one goal, of the next row's position (antmaze) or this (maze2d).

    Goals are not stored: the positions that rewards mark must fit into a disc of radius 0.5, which they do not where
    rewards stand in another row and the robot moves.
    """
    rewards = data.columns.get("rewards")
    if data.robot_key not in ("d4rl antmaze", "d4rl maze2d") or rewards is None or not np.isin(rewards, (0, 1)).all():
        return
    radius = {}
    for shift in range(-3, 5):
        rows = _rows_with(data, shift)
        xy = data.columns["observations"][rows + shift, :2][rewards[rows] == 1].astype(np.float64)
        if len(xy) < 20 or not np.isfinite(xy).all():
            return
        radius[shift] = _enclosing_radius(xy)
    usual = 1 if data.robot_key == "d4rl antmaze" else 0
    best = min(radius, key=radius.get)
    if radius[usual] > 0.52 and radius[best] < 0.505:
        severity = data.note if best in (0, 1) else data.fault
        yield severity(
            f"shifted rewards: they stand {_rows_off(usual - best)}; positions of the rows that they mark do not fit "
            "round one goal, those from there do"
        )


def _enclosing_radius(xy: np.ndarray) -> float:
    """Radius of the smallest circle round points [n, 2], to about 0.2% (Badoiu and Clarkson 2003)."""
    centre = xy.mean(axis=0)
    for step in range(1, 400):
        distances = np.linalg.norm(xy - centre, axis=1)
        centre += (xy[np.argmax(distances)] - centre) / (step + 1)
    return float(np.linalg.norm(xy - centre, axis=1).max())


def check_action_rows(data: Data) -> Iterator[Finding]:
    """Whether each action stands in the row whose change it causes, explains it, and has the right sign.

    The change of the driven columns is regressed on the observation and the action, with actions from rows nearby:
    the unexplained share must be least with the row's own. One row off it grows by a quarter (ants, walker2d) to
    several times; 0.92 leaves room for policies that repeat themselves.
    """
    actions = data.columns.get("actions")
    if data.layout == "walker" or data.robot is None or actions is None or moves_of(data) is None:
        return
    rows = _inner_rows(data)
    moves = moves_of(data)
    rows = rows[moves.follows[rows] & ~data.flagged[rows] & ~moves.inside[rows]]
    if len(rows) < 1000:
        return
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(rows, min(len(rows), SAMPLE), replace=False))
    observations = data.columns["observations"]
    before = observations[rows].astype(np.float64)
    change = (observations[rows + 1].astype(np.float64) - before)[:, data.robot.driven]
    share = {shift: _unexplained(before, actions[rows + shift], change) for shift in SHIFTS}
    best = min(share, key=share.get)
    if best != 0 and share[best] < 0.92 * share[0]:
        yield data.fault(
            f"shifted actions: the action of a step stands {_rows_off(best)}; taken from there, actions explain the "
            "changes that follow, those of the row itself do not"
        )
    elif share[0] > 0.95 * _unexplained(before, rng.permutation(actions[rows]), change):  # good data: 0.75 at most
        yield data.fault("actions do not explain the changes that follow: shuffled, replaced or empty")
    else:
        yield from _wrong_ways(data, rows)


def _wrong_ways(data: Data, rows: np.ndarray) -> Iterator[Finding]:
    """Actions that push their joint backwards: by physics, more of a torque turns its own joint further its way."""
    observations, actions = data.columns["observations"], data.columns["actions"][rows].astype(np.float64)
    before = observations[rows].astype(np.float64)
    change = observations[rows + 1].astype(np.float64) - before
    features = np.column_stack([np.ones(len(before)), before, actions])
    good = np.isfinite(features).all(axis=1) & np.isfinite(change).all(axis=1)
    effects = np.linalg.lstsq(features[good], change[good], rcond=None)[0][-actions.shape[1] :]
    own = np.array([effects[action, column] for action, column in enumerate(data.robot.turned)])
    wrong = np.flatnonzero((own < 0) & (actions[good].std(axis=0)[: len(own)] > 1e-6))
    if len(wrong) == len(own) > 0:
        yield data.fault("actions are negated: all push their joints the other way")
    elif len(wrong):
        columns = ", ".join(map(str, wrong))
        yield data.fault(f"actions push joints the other way, so columns are negated or exchanged: columns {columns}")


def _unexplained(before: np.ndarray, actions: np.ndarray, change: np.ndarray) -> float:
    """Geometric mean over columns of the share of variance that a linear model leaves."""
    features = np.column_stack([np.ones(len(before)), before, actions.astype(np.float64)])
    good = np.isfinite(features).all(axis=1) & np.isfinite(change).all(axis=1)
    features, change = features[good], change[good]
    residual = change - features @ np.linalg.lstsq(features, change, rcond=None)[0]
    moving = change.var(axis=0) > 1e-12
    shares = residual.var(axis=0)[moving] / change.var(axis=0)[moving]
    return float(np.exp(np.log(shares + 1e-9).mean())) if moving.any() else 1.0


# ----------------------------------------------------------------------------------------------------------------
# The walker study
# ----------------------------------------------------------------------------------------------------------------


def check_walker_rows(data: Data) -> Iterator[Finding]:
    """The walker study's own rules: the first row is a reset, nothing terminates, a reward lies in [0, 1]."""
    if data.layout != "walker" or data.rows == 0:
        return
    first = data.starts[
        (np.abs(data.columns["actions"][data.starts]).max(axis=1) > 0) | (data.columns["rewards"][data.starts] != 0)
    ]
    if len(first):
        yield data.fault(
            "row 0 is not a reset: it has an action or a reward, so rows are shifted or the first was lost", first
        )
    ends = np.flatnonzero(data.columns["discounts"] != 1)
    if len(ends):
        yield data.fault("discount is not 1: it ends an episode in a task that never terminates", ends)
    outside = np.flatnonzero((data.columns["rewards"] < -1e-5) | (data.columns["rewards"] > 1 + 1e-5))
    if len(outside):
        yield data.fault("rewards outside [0, 1]", outside)


def check_walker_physics(data: Data) -> Iterator[Finding]:
    """Observations and rewards of the walker study against dm_control's own, of the physics in the same row."""
    if data.layout != "walker":
        return
    named = re.search(r"walker_(walk|run)", data.dataset_id)
    rows, episodes = _walker_sample(data, 2 * SAMPLE, 40)
    recomputed = {task: _recompute(data, task, rows) for task in ([named[1]] if named else dmc_utils.TASKS)}
    if not named:
        yield data.note("the name tells no task of the walker study: rewards are held against the one that fits better")
    recorded = data.columns["rewards"][rows]
    # Where the name does not say, the task is the one whose rewards fit.
    task = min(recomputed, key=lambda task: np.nan_to_num(np.abs(recorded - recomputed[task][1])).mean())
    apart, rewards = recomputed[task]
    # Velocities and height stand in both, the height less the root's rest at 1.3 m: these are compared in all rows.
    plain = np.abs(data.columns["observations"][:, 15:] - data.columns["physics"][:, 9:]).max(axis=1)
    plain = np.fmax(plain, np.abs(data.columns["observations"][:, 14] - data.columns["physics"][:, 0] - 1.3))
    differ = np.union1d(np.flatnonzero(plain > 1e-3), rows[apart > 1e-3])  # good data: 1e-6
    if len(differ):
        yield data.fault("position jump or shifted rows: observation and physics of a row are not one state", differ)
    yield from _compare_walker_rewards(data, task, rows, episodes, rewards)


def _recompute(data: Data, task: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of the recorded observations from those of the physics, and its rewards: [n] each, nan where unknown."""
    env = _walker_env(data, task)
    suite_task, simulator = env.suite_env.task, env.suite_env.physics
    apart, rewards = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for position in np.flatnonzero(_usable(data.columns["physics"][rows])):
        row = rows[position]
        observation = env.set_physics(data.columns["physics"][row])
        apart[position] = np.abs(observation - data.columns["observations"][row]).max()
        rewards[position] = suite_task.get_reward(simulator)
    return apart, rewards


def _walker_env(data: Data, task: str) -> dmc_utils.WalkerEnv:
    if task not in data.memory:
        data.memory[task] = dmc_utils.make_env(task)
    return data.memory[task]


def _usable(physics: np.ndarray) -> np.ndarray:
    """States [n, 18] that the simulator takes: [n] bool. Real ones stay within 250 m and 100 rad/s."""
    return (np.abs(physics[:, :9]) < 1000).all(axis=1) & (np.abs(physics[:, 9:]) < 300).all(axis=1)


def _compare_walker_rewards(
    data: Data, task: str, rows: np.ndarray, episodes: np.ndarray, rewards: np.ndarray
) -> Iterator[Finding]:
    """Judge each episode: at which shift do its recorded rewards equal those of its physics?"""
    errors = []
    for shift in SHIFTS:
        taken = np.clip(rows + shift, 0, data.rows - 1)
        error = np.abs(data.columns["rewards"][taken] - rewards)
        # Row 0 has no reward, and rows of other episodes are no evidence.
        known = np.isfinite(error) & (rows > data.starts[episodes])
        known &= np.searchsorted(data.starts, taken, side="right") - 1 == episodes
        totals, counts = (
            np.bincount(episodes, np.where(known, values, 0.0), len(data.starts))
            for values in (error, np.ones(len(rows)))
        )
        errors.append(np.where(counts > 0, totals / np.maximum(counts, 1), np.inf))
    table = np.array(errors)
    # Good data agrees to 1e-7. A saturated reward of exactly 1 fits every row, and says nothing.
    wrong = (table[0] > 1e-4) & np.isfinite(table[0])
    best = np.array(SHIFTS)[np.argmin(table, axis=0)]
    moved = np.flatnonzero(wrong & (best != 0) & (table.min(axis=0) < 0.2 * table[0]))
    if len(moved):
        yield data.fault(
            f"shifted rewards: the reward of a row stands {_rows_off(int(np.median(best[moved])))}; there it is what "
            f"dm_control gives for the row's physics, in {len(moved):,} of {len(data.starts):,} episodes",
            data.starts[moved[:1]],
        )
    other = np.setdiff1d(np.flatnonzero(wrong), moved)
    if len(other):
        yield data.fault(
            f"rewards are not those of walker-{task}: dm_control gives others for the physics of the same rows, "
            f"{table[0][other].mean():.3g} away in the mean",
            data.starts[other],
        )


def _walker_sample(data: Data, total: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to recompute and their episodes: all of a small dataset, else a stretch amid every episode."""
    budget = max(total // len(data.starts), least)
    rows = [
        np.arange(start + max(0, (length - budget) // 2), start + min(length, (length + budget) // 2))
        for start, length in zip(data.starts, data.lengths, strict=True)
    ]
    return np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(part) for part in rows])


def check_walker_actions(data: Data) -> Iterator[Finding]:
    """Whether action t leads from physics t - 1 to physics t in the simulator: eight rows or more of each episode."""
    if data.layout != "walker":
        return
    rows, episodes = _walker_sample(data, 200, 8)
    physics, actions = data.columns["physics"], data.columns["actions"]
    usable = _usable(physics) & np.isfinite(actions).all(axis=1)
    last = data.starts + data.lengths - 1
    good = (rows > data.starts[episodes]) & (rows < last[episodes])
    good &= usable[rows] & usable[rows - 1] & usable[(rows + 1) % data.rows]
    rows, episodes = rows[good], episodes[good]
    env = _walker_env(data, "walk" if "walk" in data.memory else "run")  # both move alike
    errors = np.full((3, len(rows)), np.inf)
    for position, row in enumerate(rows):
        for index, shift in enumerate((0, -1, 1)):
            env.set_physics(physics[row - 1])
            with contextlib.suppress(RuntimeError):  # a state that never was may diverge
                reached = env.step(np.clip(actions[row + shift], -1, 1))[4]["physics"]
                errors[index, position] = np.abs(reached - physics[row]).max()  # good data: 1e-4
    median = np.array([[np.median(part[episodes == episode]) for episode in np.unique(episodes)] for part in errors])
    best = np.array((0, -1, 1))[np.argmin(median, axis=0)] if median.size else np.zeros(0)
    judged = np.unique(episodes)
    for shift, words in ((-1, "leaves row t"), (1, "led to row t - 1")):
        moved = judged[(best == shift) & (median.min(axis=0) < 0.1 * median[0])]
        if len(moved):
            yield data.fault(
                f"shifted actions: row t holds the action that {words}, not the one that led to it; so the simulator "
                f"says in {len(moved):,} of {len(judged):,} episodes",
                data.starts[moved[:1]],
            )
    other = judged[(median.min(axis=0) > 0.5 * median[0]) & (median[0] > 1.0)]
    if len(other):
        yield data.fault(
            "the simulator does not reach physics[t] from physics[t - 1] with action[t], nor with its neighbours",
            data.starts[other],
        )
