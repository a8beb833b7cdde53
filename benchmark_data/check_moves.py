"""Do rows follow one another? Jumps inside an episode, ends without a flag, flags where the episode goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmark_data.check_files import BLOCK, Data, Finding
from benchmark_data.check_robots import Motion

SAMPLE = 20_000  # rows that decide where all would take long


@dataclass
class Moves:
    """For each row t but the last: how row t + 1 relates to it. [N - 1] bool each; a row with nan is neither."""

    breaks: np.ndarray  # row t + 1 cannot come after row t
    follows: np.ndarray  # it looks as if it did
    exact: bool  # judged by next_observations, not by what bodies can do
    inside: np.ndarray  # [N] the row's own transition, observations -> next_observations, cannot happen; if exact
    misaligned: bool = False  # next_observations are not those of the next rows, nearly everywhere


def compare_rows(data: Data) -> Moves | None:
    """Judge all pairs of rows; None where nothing tells."""
    if data.rows < 2:
        return None
    last = data.rows - 1
    breaks, follows = np.zeros(last, bool), np.zeros(last, bool)
    inside = np.zeros(data.rows, bool)
    observations, following = data.columns["observations"], data.columns.get("next_observations")
    exact = following is not None and following.shape == observations.shape
    if exact:
        for rows in data.blocks(last):
            here, there = following[rows], observations[rows.start + 1 : rows.stop + 1]
            difference = np.abs(here - there)
            limit = 1e-4 + 1e-4 * np.abs(there)  # float32 rounding at most; a reset moves every robot further
            breaks[rows], follows[rows] = (difference > limit).any(axis=1), (difference <= limit).all(axis=1)
        for motion in data.robot.motions if data.robot else ():
            for rows in data.blocks():
                inside[rows] |= motion.strain(observations[rows], following[rows]) > 1
        inner = breaks[~data.flagged[:-1]]
        return Moves(breaks, follows, exact, inside, misaligned=bool(len(inner) and inner.mean() > 0.5))
    if data.robot is None:
        return None
    follows[:] = True
    for motion in data.robot.motions:
        array = data.columns[motion.column]
        for rows in data.blocks(last):
            strain = motion.strain(array[rows], array[rows.start + 1 : rows.stop + 1])
            breaks[rows] |= strain > 1
            follows[rows] &= strain < 0.6
    return Moves(breaks & ~_teleported(data, breaks), follows, exact, inside)


def moves_of(data: Data) -> Moves | None:
    """`compare_rows`, once a dataset."""
    if "moves" not in data.memory:
        data.memory["moves"] = compare_rows(data)
    return data.memory["moves"]


def successors(data: Data) -> np.ndarray | None:
    """next_observations where they can be relied on, else None."""
    moves = moves_of(data)
    return data.columns["next_observations"] if moves and moves.exact and not moves.misaligned else None


def mark_resets(data: Data) -> Iterator[Finding]:
    """End episodes where next_observations break off in D4RL's own replay files, which are known for missing flags."""
    moves = moves_of(data)
    if moves is None or not moves.exact or moves.misaligned or not data.from_rlkit:
        return
    missing = np.flatnonzero(moves.breaks & ~data.flagged[:-1])
    if len(missing):
        yield data.note("episode ends without a flag, as D4RL says of its replay files; taken for ends here", missing)
        data.flagged[missing] = True
        data.starts = np.concatenate([[0], np.flatnonzero(data.flagged[:-1]) + 1])


def _teleported(data: Data, breaks: np.ndarray) -> np.ndarray:
    """Breaks that a teleporter of the maze explains: the next row lies at one of its exits."""
    explained = np.zeros(len(breaks), bool)
    rows = np.flatnonzero(breaks) if len(data.teleport_exits) else []
    if len(rows):
        arrivals = data.columns["observations"][rows + 1, None, :2] - data.teleport_exits
        explained[rows] = np.linalg.norm(arrivals, axis=-1).min(axis=1) < 1.5
    return explained


def _strain_between(data: Data, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Largest strain over the robot's motions from rows `before` to rows `after`: [n]."""
    return np.max(
        [m.strain(data.columns[m.column][before], data.columns[m.column][after]) for m in data.robot.motions], 0
    )


def check_continuity(data: Data) -> Iterator[Finding]:
    """Jumps inside an episode, ends without a flag, flags where the episode goes on."""
    moves = moves_of(data)
    if moves is None:
        yield from _unusual_moves(data)
        return
    flagged = data.flagged[:-1]
    if moves.misaligned:
        yield from _shifted_successors(data)
        return
    missing = np.flatnonzero(moves.breaks & ~flagged)
    missing = missing[~(moves.inside[missing] | moves.inside[missing + 1])]
    extra = _extra_flags(data, moves)
    missing, extra, pairs = _exchanged_flags(missing, extra, np.flatnonzero(flagged))
    if pairs:
        end, flag = pairs[0]
        jump = "" if moves.exact else f" and is followed by a jump of {_jump_words(data, end)}"
        yield data.fault(
            f"swapped episode end: {_flag_name(data, flag)} ends an episode at row {flag:,}, where it goes on; it ends "
            f"at row {end:,}, which has no flag{jump}",
            [flag],
            len(pairs),
        )
    if len(extra):
        severity = data.note if data.robot_key == "d4rl antmaze" else data.fault
        yield severity(
            "misplaced episode end: a flag cuts an episode that goes on in the next row without a break", extra
        )
    if moves.exact:
        yield from _broken_transitions(data, np.flatnonzero(moves.inside), missing)
    else:
        yield from _jumps(data, missing)


def _unusual_moves(data: Data) -> Iterator[Finding]:
    """Rows of an unknown robot that change by far more than others do: worth a look, no proof."""
    observations = data.columns["observations"]
    rows = np.flatnonzero(~data.flagged[:-1])
    if len(rows) < 1000:
        return
    sample = np.random.default_rng(0).choice(rows, min(len(rows), SAMPLE), replace=False)
    scale = np.quantile(np.abs(observations[sample + 1].astype(np.float64) - observations[sample]), 0.999, axis=0)
    scale[~(scale > 0)] = np.inf  # a contact sensor that hardly ever answers says nothing
    far = [(np.abs(observations[part + 1] - observations[part]) > 20 * scale).any(1) for part in _parts(rows)]
    unusual = rows[np.concatenate(far)]
    if len(unusual):
        yield data.note("rows change by more than 20 times what all but one in 1000 do; a position jump?", unusual + 1)


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return np.array_split(rows, len(rows) // BLOCK + 1)


def _flag_name(data: Data, row: int) -> str:
    return next((n for n in ("timeouts", "terminals") if n in data.columns and data.columns[n][row]), "a flag")


def _extra_flags(data: Data, moves: Moves) -> np.ndarray:
    """Flagged rows after which the episode goes on.

    next_observations are proof. Elsewhere a new episode can by chance begin near where the last one ended (about one
    in 1,500 of a point's in the medium maze), so that a flag is only called wrong where the length is unusual too.
    D4RL's maze2d is one long walk that timeouts cut at every goal, as its authors say.
    """
    extra = np.flatnonzero(moves.follows & data.flagged[:-1])
    if moves.exact or data.robot_key == "d4rl antmaze":
        return extra
    if data.layout != "ogbench":
        return extra[:0]
    return extra[data.lengths[np.searchsorted(data.starts, extra, side="right") - 1] != usual_length(data)]


def usual_length(data: Data) -> int | None:
    """Rows an episode has: by the recipe, else the most common number where most have it."""
    if data.recipe_rows:
        return data.recipe_rows
    length, count = Counter(data.lengths.tolist()).most_common(1)[0]
    return length if count > len(data.lengths) / 2 else None


def _exchanged_flags(
    missing: np.ndarray, extra: np.ndarray, flags: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Pair each end that has no flag with a flag that ends nothing, when no other flag lies between them."""
    pairs: dict[int, int] = {}
    positions = np.searchsorted(flags, extra)
    bounds = np.concatenate([[-1], flags, [np.iinfo(np.int64).max]])
    firsts = np.searchsorted(missing, bounds[positions], side="right")
    lasts = np.searchsorted(missing, bounds[positions + 2], side="left")
    for flag, first, last in zip(extra.tolist(), firsts, lasts, strict=True):
        near = [end for end in missing[first:last].tolist() if end not in pairs] if first < last else []
        if near:
            pairs[min(near, key=lambda end: abs(end - flag))] = flag
    return np.setdiff1d(missing, list(pairs)), np.setdiff1d(extra, list(pairs.values())), list(pairs.items())


def _shifted_successors(data: Data) -> Iterator[Finding]:
    """next_observations that are not the next rows': say which rows' they are."""
    observations, following = data.columns["observations"], data.columns["next_observations"]
    rows = np.arange(2, data.rows - 3)[:SAMPLE]
    same = {
        shift: np.isclose(following[rows], observations[rows + shift], 1e-4, 1e-4).all(1).mean() for shift in (-1, 0, 2)
    }
    best = max(same, key=same.get)
    those = "row t itself" if best == 0 else f"row t{best:+d}"
    tail = f"; they are those of {those}" if same[best] > 0.5 else ""
    yield data.fault(f"shifted next_observations: in most rows t they are not the observations of row t + 1{tail}")


def _broken_transitions(data: Data, inside: np.ndarray, missing: np.ndarray) -> Iterator[Finding]:
    """Findings where next_observations tell what follows."""
    if data.robot and data.robot.reward:  # a point at rest may stay where it is, a walking robot cannot
        observations, following = data.columns["observations"], data.columns["next_observations"]
        same = np.concatenate([(observations[rows] == following[rows]).all(axis=1) for rows in data.blocks()])
        if same.any():
            what = "next_observations repeat the observation of the same row: what the step led to is lost"
            yield data.fault(what, np.flatnonzero(same))
            inside = inside[~same[inside]]
    if len(inside):
        row = int(inside[0])
        before, after = data.columns["observations"][[row]], data.columns["next_observations"][[row]]
        yield data.fault(
            f"position jump between observations and next_observations of a row: {_farthest(data, before, after)}",
            inside,
        )
    tails = _exchanged_tails(data, missing)
    if tails:
        yield _tails_finding(data, tails)
        missing = np.setdiff1d(missing, np.ravel(tails))
    if len(missing):
        yield data.fault(
            "episode end without a flag, or a position jump: next_observations[t] is not observations[t + 1], and "
            "neither terminals nor timeouts is set",
            missing,
        )


def _farthest(data: Data, before: np.ndarray, after: np.ndarray) -> str:
    """In words: what moves most beyond its slack between two rows [1, .]."""
    motions = [motion for motion in data.robot.motions if motion.column == "observations"]
    motion = max(motions, key=lambda motion: np.nan_to_num(motion.strain(before, after)[0]))
    return f"{motion.strain(before, after)[0] * motion.slack:.3g} in {motion.word}, beyond what a step can do"


def _jumps(data: Data, missing: np.ndarray) -> Iterator[Finding]:
    """Findings where the robot's own motion tells that row t + 1 does not follow from row t."""
    # A row that lies apart from both neighbours, which follow one another, is one bad row and not a new episode.
    first = missing[:-1][np.diff(missing) == 1]
    alone = first[_strain_between(data, first, first + 2) < 2] if len(first) else first
    if len(alone):
        yield data.fault(
            f"position jump: a row lies apart from the rows before and after it, which are one path; "
            f"{_jump_words(data, alone[0])}",
            alone + 1,
        )
    rest = np.setdiff1d(missing, np.concatenate([alone, alone + 1]))
    tails = _exchanged_tails(data, rest)
    if tails:
        yield _tails_finding(data, tails)
        rest = np.setdiff1d(rest, np.ravel(tails))
    if len(rest):
        like = ", the fault of D4RL's antmaze v0" if data.robot and data.robot.maze else ""
        yield data.fault(
            "position jump: rows of one episode do not follow one another, so a flag for an episode's end is missing "
            f"or rows were lost or moved{like}; {_jump_words(data, rest[0])}",
            rest + 1,
        )


def _jump_words(data: Data, row: int) -> str:
    """How far the first jump goes."""
    motion = max(data.robot.motions, key=lambda m: _one_strain(data, m, row))
    array = data.columns[motion.column]
    move = np.abs(array[row + 1].astype(np.float64) - array[row])[list(motion.q)].max()
    return f"{move:.3g} in {motion.word} in one step"


def _one_strain(data: Data, motion: Motion, row: int) -> float:
    array = data.columns[motion.column]
    return float(np.nan_to_num(motion.strain(array[row : row + 1], array[row + 1 : row + 2])[0]))


def _exchanged_tails(data: Data, jumps: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of jumps (t, u) where row u + 1 follows row t and row t + 1 follows row u."""
    if not 2 <= len(jumps) <= 64:
        return []
    before, after = (grid.ravel() for grid in np.meshgrid(jumps, jumps + 1, indexing="ij"))
    if moves_of(data).exact:
        following, observations = data.columns["next_observations"], data.columns["observations"]
        fits = np.isclose(following[before], observations[after], 1e-4, 1e-4).all(axis=1)
    else:
        fits = _strain_between(data, before, after) < 0.6
    fits = fits.reshape(len(jumps), -1)
    used: set[int] = set()
    pairs = []
    for i, j in np.argwhere(fits & fits.T).tolist():
        if i < j and not used & {i, j} and data.episode(jumps[i]) != data.episode(jumps[j]):
            used |= {i, j}
            pairs.append((int(jumps[i]), int(jumps[j])))
    return pairs


def _tails_finding(data: Data, tails: list[tuple[int, int]]) -> Finding:
    one, other = tails[0]
    return data.fault(
        f"swapped episode ends: what follows {data.at(one)} is the end of another episode, whose rows go on after "
        f"{data.at(other)}",
        count=len(tails),
    )
