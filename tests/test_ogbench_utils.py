"""Dataset files, windows, goals, downloads and environments of OGBench."""

import functools
import http.server
import io
import os
import tempfile
import threading

import gymnasium
import numpy as np
import pytest
import torch

import ogbench_utils
from ogbench_utils import NEVER, MazeDataset, TrajectoryDataset, make_env, parse_dataset_id, seeded_reset
from opso.maze import Maze, evaluation_tasks
from utils import UserError

OFFICIAL = "pointmaze-medium-navigate-v0"


def episodes(*lengths, dim=2):
    """Arrays whose observation [r, 0] is the row and [r, 1] the episode."""
    rows = sum(lengths)
    terminals = np.zeros(rows, dtype=bool)
    terminals[np.cumsum(lengths) - 1] = True
    observations = np.zeros((rows, dim), dtype=np.float32)
    observations[:, 0] = np.arange(rows)
    observations[:, 1] = np.repeat(np.arange(len(lengths)), lengths)
    actions = np.random.default_rng(0).uniform(-1, 1, (rows, 2)).astype(np.float32)
    return {"observations": observations, "actions": actions, "terminals": terminals}


def npz_bytes(arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "bad", ["pointmaze-medium-navigate", "../" + OFFICIAL, "local/../" + OFFICIAL, "pointmaze-medium-explore-v0"]
)
def test_other_ids_are_refused_with_the_nearest_one(bad, tmp_path):
    with pytest.raises(UserError, match="did you mean '(local/)?[a-z]+maze-"):
        parse_dataset_id(bad).ensure(tmp_path)


def test_dataset_dir_argument_then_variable_then_beside_the_code(monkeypatch, tmp_path):
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "b"))
    assert parse_dataset_id(OFFICIAL).folder(str(tmp_path / "a")) == tmp_path / "a"
    assert parse_dataset_id(OFFICIAL).folder(None) == tmp_path / "b"
    monkeypatch.delenv("OGBENCH_DATASET_DIR")
    assert parse_dataset_id(OFFICIAL).folder(None).name == "datasets"
    assert (parse_dataset_id(OFFICIAL).folder(None).parent / "ogbench_utils.py").exists()


def with_value(key, index, value):
    arrays = episodes(4, 3)
    arrays[key][index] = value
    return arrays


BAD_ARRAYS = {
    "no array 'actions'": {"observations": np.zeros((2, 2)), "terminals": np.ones(2)},
    "observations row 5 holds NaN": with_value("observations", (5, 1), np.nan),
    r"last row \(6\) does not end": with_value("terminals", 6, False),
    "ends at row 4 has fewer than 2": with_value("terminals", 4, True),
    "not a readable npz of plain": episodes(4, 3) | {"actions": np.array([[{}, {}]] * 7, dtype=object)},
}


@pytest.mark.parametrize("fault", BAD_ARRAYS)
def test_each_fault_of_a_file_is_named(fault, tmp_path):
    path = tmp_path / "bad.npz"
    path.write_bytes(npz_bytes(BAD_ARRAYS[fault]))
    with pytest.raises(UserError, match=fault) as caught:
        parse_dataset_id(OFFICIAL).read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_episodes_without_a_jump(tmp_path):
    """A mark a row off, or missing, shows where the robot would have jumped."""
    dataset, path, arrays = parse_dataset_id(OFFICIAL), tmp_path / f"{OFFICIAL}.npz", episodes(4, 3, 5)
    arrays["observations"] = np.cumsum(np.full((12, 2), 0.2, np.float32), axis=0)
    arrays["observations"][4:7] += 10
    np.savez(path, **arrays)
    assert len(dataset.read(path)["terminals"]) == 12
    for marks in ([2, 6, 11], [4, 6, 11], [6, 11]):
        np.savez(path, **(arrays | {"terminals": np.isin(np.arange(12), marks)}))
        with pytest.raises(UserError, match=r"row 4 cannot follow row 3 in an episode.*a mark in terminals is missing"):
            dataset.read(path)


def test_a_file_written_from_what_ogbenchs_loader_returns(tmp_path):
    arrays = episodes(4, 3)
    for more in ({"next_observations": arrays["observations"]}, {"valids": np.ones(7)}):
        np.savez(tmp_path / "again.npz", **arrays, **more)
        with pytest.raises(UserError, match="again.npz: was written from what OGBench's loader returns"):
            parse_dataset_id(OFFICIAL).read(tmp_path / "again.npz")


def test_layout_and_max_trajectories():
    data = TrajectoryDataset(episodes(5, 3))
    assert (data.num_trajectories, data.observation_dim, data.action_dim) == (2, 2, 2)
    assert data.episode_start.tolist() == [0] * 5 + [5] * 3
    assert data.episode_end.tolist() == [4] * 5 + [7] * 3
    first = TrajectoryDataset(episodes(5, 3), max_trajectories=1)
    assert (len(first.observations), first.num_trajectories, first.episode_lengths.tolist()) == (5, 1, [5])
    assert TrajectoryDataset(episodes(5, 3), max_trajectories=9).num_trajectories == 2
    with pytest.raises(UserError, match="max_trajectories"):
        TrajectoryDataset(episodes(5, 3), max_trajectories=0)


def test_normalizer():
    arrays = episodes(50, 30, dim=3)
    arrays["observations"][:, 1] = 1e6 + np.random.default_rng(0).normal(size=80) * 1e-6
    arrays["observations"][:, 2] = 7.0
    mean, std = TrajectoryDataset(arrays).normalizer()
    np.testing.assert_allclose(mean[0], 39.5)
    np.testing.assert_allclose(std[0], np.arange(80).std(), rtol=1e-6)
    assert mean[2] == 7.0 and std[2] == 1.0
    assert std.min() >= 1e-3


def test_windows_stay_in_an_episode_and_pad_only_short_ones():
    data = TrajectoryDataset(episodes(9, 2, 5, 6))
    batch = data.sample_windows(2000, 4, generator())
    rows, valid, seen = batch["rows"], batch["valid"], batch["observations"]
    assert rows.shape == (2000, 5) and valid.shape == (2000, 4) and seen.shape == (2000, 5, 2)
    assert torch.equal(seen[..., 0].long(), rows)
    assert (seen[..., 1] == seen[:, :1, 1]).all()
    assert torch.equal(valid, rows[:, 1:] == rows[:, :-1] + 1)
    short = seen[:, 0, 1] == 1
    assert short.any() and valid[~short].all()
    assert (rows[short] == torch.tensor([9, 10, 10, 10, 10])).all()
    assert (valid[short] == torch.tensor([True, False, False, False])).all()


def test_every_start_is_equally_likely():
    starts = TrajectoryDataset(episodes(9, 2, 5, 6)).sample_windows(80_000, 4, generator())["rows"][:, 0]
    values, counts = starts.unique(return_counts=True)
    # 5 starts of the first episode, the padded one, 1 of the third, 2 of the last.
    assert values.tolist() == [0, 1, 2, 3, 4, 9, 11, 16, 17]
    expected = 80_000 / 9
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


@pytest.fixture(scope="module")
def goal_data():
    return TrajectoryDataset(episodes(300, 2, 500))


def test_goal_kinds(goal_data):
    rows = goal_data.sample_windows(500, 8, generator())["rows"][:, :-1]
    end = goal_data.episode_end[rows]
    goals, steps = goal_data.sample_goals(rows, generator(), 1.0, 0.0, 0.0, 0.9)
    assert torch.equal(goals, torch.minimum(rows + 1, end))
    assert torch.equal(steps, torch.where(rows < end, torch.ones_like(rows), torch.full_like(rows, NEVER)))
    goals, steps = goal_data.sample_goals(rows, generator(), 0.0, 1.0, 0.0, 0.9)
    assert (goals <= end).all() and (goals[rows < end] > rows[rows < end]).all()
    assert torch.equal(steps[rows < end], (goals - rows)[rows < end])
    goals, steps = goal_data.sample_goals(rows, generator(), 0.0, 0.0, 1.0, 0.9)
    ahead = (goal_data.episode_start[goals] == goal_data.episode_start[rows]) & (goals > rows)
    assert ahead.any() and not ahead.all()
    assert torch.equal(steps, torch.where(ahead, goals - rows, torch.full_like(rows, NEVER)))


def test_goal_distribution(goal_data):
    start = torch.full((400, 200), 302)
    goals, _ = goal_data.sample_goals(start, generator(), 0.0, 1.0, 0.0, 0.95)
    steps = (goals - start).double()
    assert steps.min() == 1
    assert abs(steps.mean() - 20) < 0.4  # a geometric's mean is 1 / (1 - discount)
    assert abs((steps == 1).double().mean() - 0.05) < 0.005
    goals, _ = goal_data.sample_goals(start, generator(), 0.2, 0.3, 0.5, 0.0)
    # With discount 0 "future" is the next state too, and a random row hits it once in 802.
    assert abs((goals == 303).double().mean() - (0.5 + 0.5 / 802)) < 0.01
    assert abs((goals < 302).double().mean() - 0.5 * 302 / 802) < 0.01


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; sends at most `server.cuts.pop(0)` bytes of a body, then closes the connection."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        content = server.files.get(self.path.rsplit("/", 1)[-1])
        if content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range") if server.resumes else None
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        body = content[begin:]
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        running.files = {f"{OFFICIAL}{end}.npz": npz_bytes(episodes(20_000, 10_000)) for end in ("", "-val")}
        running.resumes, running.cuts, running.requests = True, [], []
        running.url = f"http://127.0.0.1:{running.server_port}/ogbench"
        monkeypatch.setattr(MazeDataset, "url", running.url)
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


WHOLE = [f"{OFFICIAL}-val.npz", f"{OFFICIAL}.npz"]


def test_download_then_no_network(server, tmp_path):
    folder = tmp_path / "data"
    train, val = parse_dataset_id(OFFICIAL).ensure(folder)
    assert names(folder) == WHOLE and [val.name, train.name] == WHOLE
    assert train.read_bytes() == server.files[train.name]
    assert parse_dataset_id(OFFICIAL).ensure(folder) == (train, val) and len(server.requests) == 2
    data = parse_dataset_id(OFFICIAL).load("val", folder, max_trajectories=1)
    assert data.num_trajectories == 1


@pytest.mark.parametrize("resumes", [True, False])
def test_a_cut_download_goes_on_at_once_and_one_cut_twice_in_the_next_run(server, tmp_path, resumes):
    server.resumes, server.cuts = resumes, [100_000, 100_000, 100_000]
    with pytest.raises(UserError, match=f"{server.url}/{OFFICIAL}.npz .*{tmp_path}.* local/{OFFICIAL}"):
        parse_dataset_id(OFFICIAL).ensure(tmp_path)
    assert names(tmp_path) == [f"{OFFICIAL}.npz.part"]
    train, _ = parse_dataset_id(OFFICIAL).ensure(tmp_path)  # which is cut once
    assert 0 < int(server.requests[2]["Range"].removeprefix("bytes=").removesuffix("-")) <= 200_000
    assert train.read_bytes() == server.files[train.name] and names(tmp_path) == WHOLE


@pytest.mark.parametrize(
    "content, left, fault",
    [
        (b"<html>log in to continue</html>", b"", "not a readable npz"),
        (npz_bytes(episodes(20, dim=3)), b"", "3 observation and 2 action numbers"),
        (npz_bytes(episodes(20_000, 10_000)), b"x" * 1000, "not a readable npz"),  # of an attempt at another file
    ],
)
def test_wrong_content_is_refused_and_removed(server, tmp_path, content, left, fault):
    server.files[f"{OFFICIAL}.npz"] = content
    if left:
        (tmp_path / f"{OFFICIAL}.npz.part").write_bytes(left)
    with pytest.raises(UserError, match=f"{server.url}.* is not the dataset: .*{fault}"):
        parse_dataset_id(OFFICIAL).ensure(tmp_path)
    assert names(tmp_path) == []


def test_absent_and_unreachable_addresses(server, tmp_path, monkeypatch):
    server.files.clear()
    with pytest.raises(UserError, match="HTTP status 404") as caught:
        parse_dataset_id("antmaze-medium-explore-v0").ensure(tmp_path)
    # No recipe makes ant data here, so the advice names one that works.
    assert "use local/antmaze-medium-explore-v0," in str(caught.value)
    monkeypatch.setattr(MazeDataset, "url", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=rf"cannot download http://127.0.0.1:9/{OFFICIAL}.npz \(ConnectionError\)"):
        parse_dataset_id(OFFICIAL).ensure(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give the folder that holds it"):
        parse_dataset_id(OFFICIAL).ensure(tmp_path / "file")
    assert names(tmp_path) == ["file"]


@functools.lru_cache(maxsize=1)
def point_env():
    return make_env(OFFICIAL)


def test_seeded_reset_is_reproducible_and_leaves_numpy_alone():
    env = point_env()
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first, info = seeded_reset(env, 3, {"task_id": 2})
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    for _ in range(4):
        env.step(env.action_space.sample())
    np.random.seed(6)
    again, info_again = seeded_reset(env, 3, {"task_id": 2})
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(info["goal"], info_again["goal"])
    assert first.dtype == np.float32
    assert not np.array_equal(first, seeded_reset(env, 4, {"task_id": 2})[0])


def test_five_tasks():
    env = point_env()
    tasks = evaluation_tasks(env)
    maze = Maze.from_env(env)
    assert [task.task_id for task in tasks] == [1, 2, 3, 4, 5]
    for task, known in zip(tasks, env.unwrapped.task_infos, strict=True):
        assert tuple(maze.xy_to_ij(task.init_xy)) == known["init_ij"]
        assert tuple(maze.xy_to_ij(task.goal_xy)) == known["goal_ij"]
        np.testing.assert_allclose(task.goal_observation, task.goal_xy, rtol=1e-6)
        assert task.goal_observation.dtype == np.float32


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads Linux's /proc")
def test_no_file_or_descriptor_is_left_behind(monkeypatch, tmp_path):
    point_env()  # what is loaded once is loaded now
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    open_before = len(os.listdir("/proc/self/fd"))
    env = make_env("pointmaze-large-navigate-v0")
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert env.reset()[0].shape == (2,)


def test_dimensions_and_limits_are_the_environments():
    for family, (observation_dim, action_dim) in ogbench_utils._DIMENSIONS.items():
        env = make_env(f"{family}-medium-navigate-v0")
        assert env.observation_space.shape == (observation_dim,) and env.action_space.shape == (action_dim,)
    limits = {"antmaze-giant-navigate-v0": 1000, "humanoidmaze-large-stitch-v0": 2000}
    for dataset_id, steps in (limits | {"humanoidmaze-giant-navigate-v0": 4000}).items():
        assert ogbench_utils.max_episode_steps(dataset_id) == steps
    for dataset in ogbench_utils.DATASETS.values():
        assert gymnasium.spec(dataset.env_id) is not None
