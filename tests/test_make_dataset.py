"""Datasets generated on this machine: the recipe, the files, and what happens when they are there already."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import d4rl_utils
import dmc_utils
import make_dataset
import ogbench_utils
from benchmark_data import generation, local, maze
from benchmark_data.check import check
from benchmark_data.local import find_family, generate, generate_if_missing
from benchmark_data.maze import Ways, cell_distances
from ogbench_utils import make_env, parse_dataset_id
from opso.maze import Maze
from utils import UserError

STITCH = "local/pointmaze-medium-stitch-v0"
read = parse_dataset_id(STITCH).read
NAVIGATE = "local/pointmaze-medium-navigate-v0"
EXPERTS = Path(make_dataset.__file__).parent / "datasets" / "experts"
FILES = ["pointmaze-medium-stitch-v0-val.npz", "pointmaze-medium-stitch-v0.json", "pointmaze-medium-stitch-v0.npz"]


def names(folder):
    return sorted(path.name for path in folder.glob("*") if path.suffix != ".lock")


@pytest.fixture(scope="module")
def stitch_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stitch")
    generate(STITCH, 12, 0, folder, progress=False)
    return folder


def test_ways_equal_the_environments_oracle():
    env = make_env("pointmaze-large-navigate-v0").unwrapped
    ways, rng = Ways(env.maze_map), np.random.default_rng(0)
    centres = [env.ij_to_xy(ij) for ij in np.argwhere(env.maze_map == 0).tolist()]
    starts = [np.array(xy) + rng.uniform(-2.1, 2.1, 2) for xy in centres]  # some lie a little inside a wall
    for start, goal in itertools.product(starts, centres[::3]):
        expected, distances = env.get_oracle_subgoal(start, goal)
        found = ways.next_cell(env.xy_to_ij(start), env.xy_to_ij(goal))
        np.testing.assert_array_equal(env.ij_to_xy(found), expected)
    np.testing.assert_array_equal(cell_distances(env.maze_map, env.xy_to_ij(goal)), distances)


def test_episodes_follow_the_recipe(stitch_dir):
    data = parse_dataset_id(STITCH).load(dataset_dir=stitch_dir)
    maze = Maze.from_env(make_env(STITCH))
    starts = data.observations[data.episode_starts].numpy()
    # Half the way is walked well before the end; then the noise alone moves the point round its goal.
    ends = data.observations.reshape(12, 201, 2)[:, -40:].mean(dim=1).numpy()
    assert len({tuple(cell) for cell in maze.xy_to_ij(starts)}) > 4
    for start, end in zip(starts, ends, strict=True):
        away = cell_distances(maze.maze_map, tuple(maze.xy_to_ij(start)))[tuple(maze.xy_to_ij(end))]
        assert away == 4
    steps = np.diff(data.observations.reshape(12, 201, 2).numpy(), axis=1)
    actions = data.actions.reshape(12, 201, 2)[:, :-1].numpy()
    # Away from walls an action of 1 moves the point by 0.2; rows pair a state with the action taken there.
    assert np.median(np.abs(steps - 0.2 * actions)) < 1e-4
    assert 0.2 < np.abs(actions).mean() < 0.8 and np.abs(actions).max() == 1.0


def test_navigate_goes_on_to_new_goals():
    maker = maze.EpisodeMaker(NAVIGATE, EXPERTS)
    episode, reached = maker.make(np.random.SeedSequence(0))
    assert reached > 3 and len(episode["terminals"]) == 1001
    cells = {tuple(cell) for cell in Maze.from_env(maker.env).xy_to_ij(episode["observations"])}
    assert len(cells) > 15  # one goal alone would leave most of the 26 cells unseen
    assert np.isfinite(maker.maze_env.model.geom("target").pos).all()


def test_bytes_do_not_depend_on_jobs_but_on_the_seed(stitch_dir, tmp_path):
    generate(STITCH, 12, 0, tmp_path / "two", jobs=2, progress=False)
    other = generate(STITCH, 2, 1, tmp_path / "other", progress=False)
    for name in FILES:
        if name.endswith(".npz"):
            assert (stitch_dir / "local" / name).read_bytes() == (tmp_path / "two" / "local" / name).read_bytes()
    same_rows = slice(0, 2 * 201)
    whole = read(stitch_dir / "local" / FILES[2])["observations"][same_rows]
    assert not np.array_equal(read(other)["observations"], whole)
    # The first episodes are the same however many follow, and validation repeats none of them.
    fewer = generate(STITCH, 2, 0, tmp_path / "fewer", progress=False)
    np.testing.assert_array_equal(read(fewer)["observations"], whole)
    assert not np.array_equal(read(tmp_path / "fewer" / "local" / FILES[0])["observations"], whole[:201])


def test_manifest(stitch_dir):
    manifest = parse_dataset_id(STITCH).manifest(stitch_dir)
    assert (manifest["id"], manifest["seed"], manifest["num_episodes"]) == (STITCH, 0, 12)
    assert "4 cells" in manifest["recipe"] and "noise of 0.5" in manifest["recipe"]
    assert {"python", "numpy", "mujoco", "gymnasium", "ogbench", "blas", "cpu"} <= set(manifest["versions"])
    assert (manifest["episodes"], manifest["transitions"], manifest["policies"]) == (12, 12 * 200, {})
    assert 0 <= manifest["goal_reached"] <= 1
    for name, entry in manifest["files"].items():
        content = (stitch_dir / "local" / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest() and entry["bytes"] == len(content)
    assert names(stitch_dir / "local") == FILES


def test_existing_dataset_is_kept_or_replaced_on_request(tmp_path, capsys):
    arguments = ["--dataset", STITCH, "--num_episodes", "2", "--dataset_dir", str(tmp_path)]
    make_dataset.main(arguments)
    before = (tmp_path / "local" / FILES[2]).stat().st_mtime_ns
    capsys.readouterr()
    make_dataset.main(arguments)
    assert "already at" in capsys.readouterr().err
    generate_if_missing(STITCH, tmp_path)  # it asks for 100 episodes only where there are none
    assert (tmp_path / "local" / FILES[2]).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="2 episodes of seed 0, not 2 of seed 1.*--overwrite"):
        make_dataset.main([*arguments, "--seed", "1"])
    with pytest.raises(UserError, match=f"{FILES[2]} holds 2 episodes of seed 0, not 3"):
        generate(STITCH, 3, 0, tmp_path, progress=False)
    assert parse_dataset_id(STITCH).manifest(tmp_path)["seed"] == 0
    make_dataset.main([*arguments, "--seed", "1", "--overwrite"])
    assert parse_dataset_id(STITCH).manifest(tmp_path)["seed"] == 1 and names(tmp_path / "local") == FILES


@pytest.mark.parametrize("number", range(3))
def test_an_incomplete_dataset_does_not_pass(stitch_dir, tmp_path, number):
    """Without its manifest, and with either file cut."""
    shutil.copytree(stitch_dir / "local", tmp_path / "local")
    parse_dataset_id(STITCH).ensure(tmp_path)
    path = tmp_path / "local" / FILES[number]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="no complete dataset.*make_dataset.py"):
        parse_dataset_id(STITCH).ensure(tmp_path)


def test_files_that_nobody_here_made_are_kept_unless_asked(tmp_path):
    name = FILES[0]
    mine = tmp_path / "local" / name
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(UserError, match=f"{name} is there without a complete dataset's manifest.*--overwrite"):
        generate(STITCH, 1, 0, tmp_path, progress=False)
    assert names(mine.parent) == [name] and mine.read_text() == "precious"
    generate(STITCH, 1, 0, tmp_path, progress=False, overwrite=True)
    assert names(mine.parent) == FILES and parse_dataset_id(STITCH).manifest(tmp_path)


@pytest.mark.parametrize(
    "dataset_id, message",
    [
        ("local/humanoidmaze-large-stitch-v0", "not shipped"),
        ("local/pointmaze-giant-navigate-v0", "did you mean 'local/pointmaze-.*'"),
        ("pointmaze-medium-navigate-v0", "official file.*local/pointmaze-medium-navigate-v0"),
        ("../../etc/local/hopper-medium-v2", "cannot be made here"),
        ("cartpole", "^dataset 'cartpole' cannot be made here; see .*--list"),
    ],
)
def test_ids_that_cannot_be_made(dataset_id, message, tmp_path):
    with pytest.raises(UserError, match=message):
        generate(dataset_id, 1, 0, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error, told, words",
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            OSError(errno.ENOSPC, "No space left", "a.npz"),
            UserError,
            "cannot write there .No space left.*--dataset_dir",
        ),
        (ZeroDivisionError(), ZeroDivisionError, None),
    ],
)
def test_a_run_that_stops_early_leaves_no_dataset_and_says_so(tmp_path, monkeypatch, error, told, words):
    made = maze._make_episode

    def failing(task):
        if task[1] == 1:
            raise error
        return made(task)

    monkeypatch.setattr(maze, "_make_episode", failing)
    with pytest.raises(told, match=words):
        make_dataset.main(["--dataset", STITCH, "--num_episodes", "2", "--dataset_dir", str(tmp_path)])
    assert names(tmp_path / "local") == []
    with pytest.raises(UserError, match=f"python make_dataset.py --dataset {STITCH} --dataset_dir"):
        parse_dataset_id(STITCH).ensure(tmp_path)  # nor is a local one downloaded


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dataset", STITCH, "--num_transitions", "5"], "counted in episodes; use --num_episodes"),
        (["--dataset", "local/hopper-medium-v2", "--num_episodes", "5"], "counted in transitions; use --num_tran"),
        (["--dataset", STITCH, "--experts_dir", "absent"], "^--experts_dir absent: no such folder"),
        (["--dataset", "local/hopper-medium-v2", "--experts_dir", "."], "cannot .*train_expert --env hopper`"),
    ],
)
def test_flags_that_make_nothing(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        make_dataset.main([*flags, "--dataset_dir", "data"])
    assert names(tmp_path) == []


def test_the_families_cover_the_ids_that_are_offered():
    offered = [*ogbench_utils.GENERATED_IDS, *d4rl_utils.GENERATED_IDS, *dmc_utils.GENERATED_IDS]
    covered = [dataset_id for family in local.FAMILIES for dataset_id in family.ids]
    assert sorted(covered) == sorted(offered) and len(covered) == 20 + 15 + 4
    episodes = {"navigate": (100, 1000), "stitch": (300, 5000), "explore": (500, 10_000)}  # as OGBench's scripts make
    for task, sizes in episodes.items():
        names = [f"local/antmaze-large-{task}{full}-v0" for full in ("", "-full")]
        assert tuple(find_family(name).default_size(name) for name in names) == sizes


@pytest.mark.parametrize("task_type, rows", [("stitch", 201), ("explore", 501)])
def test_ant_episodes(tmp_path, task_type, rows):
    dataset_id = f"local/antmaze-medium-{task_type}-v0"
    path = generate(dataset_id, 2, 0, tmp_path, progress=False)
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    shapes = {key: array.shape for key, array in arrays.items()}
    assert shapes["observations"] == (2 * rows, 29) and shapes["actions"] == (2 * rows, 8)
    assert shapes["qpos"] == (2 * rows, 15) and shapes["qvel"] == (2 * rows, 14)
    np.testing.assert_array_equal(arrays["observations"], np.hstack([arrays["qpos"], arrays["qvel"]]))
    xy = arrays["observations"][:, :2].reshape(2, rows, 2)
    walked = np.linalg.norm(np.diff(xy[:, ::20], axis=1), axis=-1)
    assert np.median(walked) > (1.0 if task_type == "stitch" else 0.2)  # metres in 20 steps: it walks, and stays up
    assert (arrays["observations"][:, 2] > 0.2).mean() > 0.95
    manifest = parse_dataset_id(dataset_id).manifest(tmp_path)
    assert list(manifest["policies"]) == ["ant-xy_400000.safetensors"]
    assert f"noise of {1 if task_type == 'explore' else 0.2}" in manifest["recipe"]
    assert check(path).findings == []  # the simulator goes from each row's state to the next one's


def test_ones_own_policy_of_the_most_steps_walks(tmp_path):
    for step in (400_000, 9_000, 1_000_000):
        shutil.copy(EXPERTS / "ant-xy_400000.safetensors", tmp_path / f"ant-xy_{step}.safetensors")
    (tmp_path / "ant-xy_best.safetensors").write_text("not a step")
    (path,) = maze.MazeFamily().policies("local/antmaze-medium-stitch-v0", tmp_path)
    assert path == tmp_path / "ant-xy_1000000.safetensors"


def test_another_policy_makes_another_dataset(tmp_path):
    """A dataset that other policies made is neither taken for this one nor replaced unasked."""
    dataset_id = "local/antmaze-medium-stitch-v0"
    generate(dataset_id, 1, 0, tmp_path, progress=False)
    manifest_path = tmp_path / "local" / "antmaze-medium-stitch-v0.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["policies"] = {"ant-xy_400000.safetensors": "0" * 64}
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="made by other policies.*--overwrite"):
        generate(dataset_id, 1, 0, tmp_path, progress=False)


def _die(value):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told_in_one_line():
    plan = generation.Plan(STITCH, 3, 0, EXPERTS, jobs=2, progress=False)
    with pytest.raises(UserError, match="a worker was killed, probably out of memory; use fewer --jobs"):
        list(generation.run_tasks(_die, [1, 2, 3], plan))


def test_a_dataset_waits_for_another_that_makes_it_and_takes_that_and_no_other_waits(tmp_path, capsys):
    folder, found = tmp_path / "local", []
    folder.mkdir()
    waiting = threading.Thread(target=lambda: found.append(generate(STITCH, 1, 0, tmp_path, progress=False)))
    with generation.alone_making(folder / FILES[2]):
        generate(NAVIGATE, 1, 0, tmp_path, progress=False)
        assert "waiting" not in capsys.readouterr().err
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive() and not (folder / FILES[2]).exists()
        generate(STITCH, 1, 0, tmp_path / "other", progress=False)
        shutil.copytree(tmp_path / "other" / "local", folder, dirs_exist_ok=True)
        made = (folder / FILES[2]).stat()
    waiting.join(timeout=60)
    assert f"{FILES[2]}: waiting for another process that makes it" in capsys.readouterr().err
    assert found == [folder / FILES[2]] and os.path.samestat(made, found[0].stat())


def test_the_list_tells_what_is_there_and_how_to_get_the_rest(tmp_path, capsys):
    generate(STITCH, 2, 3, tmp_path, progress=False)
    make_dataset.main(["--list", "--dataset_dir", str(tmp_path)])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert "size" in lines["id"] and "path of what is there" in lines["id"]
    assert "2 episodes, seed 3" in lines[STITCH] and str(tmp_path / "local") in lines[STITCH]
    assert lines["local/hopper-medium-v2"].split()[1:] == ["-", "100,000", "transitions", "hopper_medium-v2.hdf5"]
    assert lines["antmaze-giant-stitch-v0"].split()[1:] == ["-", "official", "antmaze-giant-stitch-v0.npz"]
    assert lines["hopper-medium-v2"].split()[1:] == ["-", "official", "hopper_medium-v2.hdf5"]
    for family in local.FAMILIES:
        assert set(family.ids) <= set(lines)
    assert {*d4rl_utils.OFFICIAL_IDS, "pointmaze-teleport-stitch-v0", "humanoidmaze-giant-navigate-v0"} <= set(lines)
