"""D4RL's ids, folders and files: what is read, fetched and refused and with which words, transitions, environments."""

import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

import d4rl_utils
import dataset_files
from d4rl_utils import DATASETS, GENERATED_IDS, OFFICIAL_IDS, make_env
from dataset_files import whole_returns
from offline_data import find_dataset
from utils import UserError

ROWS = 12
HOPPER, ANTMAZE, ANT = "hopper-medium-replay-v2", "antmaze-umaze-v2", (29, 8)
read = DATASETS[HOPPER].read


def test_a_file_too_short_is_not_the_official_one():
    assert d4rl_utils.is_official("hopper-medium-v2", 999_998) and d4rl_utils.is_official("antmaze-umaze-v2", 998_573)
    assert d4rl_utils.is_official("hopper-medium-v2", 100_000) is False
    assert d4rl_utils.is_official("walker2d-medium-expert-v2", 1_000_000) is False
    assert d4rl_utils.is_official("local/hopper-medium-v2", 10) is None
    assert d4rl_utils.is_official("minari/mujoco/hopper/medium-v0", 10) is None


def tiny_columns() -> dict[str, np.ndarray]:
    """Three episodes of 5, 3 and 4 rows: a fall, a timeout, and one that the file's end cuts without a mark."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(ROWS, 11)).astype(np.float32)
    following = np.roll(observations, -1, axis=0)
    following[[4, 7, 11]] += 1
    terminals, timeouts = np.zeros(ROWS, dtype=bool), np.zeros(ROWS, dtype=bool)
    terminals[4] = timeouts[7] = True
    return {
        "observations": observations,
        "next_observations": following,
        "actions": rng.uniform(-1, 1, size=(ROWS, 3)).astype(np.float32),
        "rewards": np.arange(ROWS, dtype=np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
        "infos/qpos": rng.normal(size=(ROWS, 6)),
        "infos/qvel": rng.normal(size=(ROWS, 6)),
    }


def write(path: Path, columns: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column, compression="gzip")
        file["metadata/algorithm"] = np.bytes_("SAC")
    return path


@pytest.fixture
def tiny(tmp_path):
    return write(tmp_path / "tiny.hdf5", tiny_columns())


def test_addresses_are_d4rls():
    addresses = {name: f"{DATASETS[name].url}/{DATASETS[name].files[0]}" for name in OFFICIAL_IDS}
    assert len(set(addresses.values())) == len(addresses) == 24 and len(GENERATED_IDS) == 15
    begin = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
    assert addresses["walker2d-full-replay-v2"] == f"{begin}/gym_mujoco_v2/walker2d_full_replay-v2.hdf5"
    name = "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5"
    assert addresses["antmaze-medium-play-v2"] == f"{begin}/ant_maze_v2/{name}"


def test_folders(tmp_path, monkeypatch, repository):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    official, local = "hopper-medium-replay-v2", "local/hopper-medium-replay-v2"
    file = "hopper_medium_replay-v2.hdf5"
    assert find_dataset(official).paths()[0] == tmp_path / "home/.d4rl/datasets" / file
    assert find_dataset(local).paths()[0] == repository / "datasets/local" / file
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "variable"))
    assert find_dataset(official).paths()[0] == tmp_path / "variable" / file
    assert find_dataset(local).paths()[0] == tmp_path / "variable/local" / file
    assert find_dataset(official).paths(tmp_path)[0] == tmp_path / file
    assert find_dataset(local).manifest_path("~/data") == tmp_path / "home/data/local/hopper_medium_replay-v2.json"


def test_what_d4rls_loader_takes_is_taken(tmp_path):
    """Columns of shape [rows, 1], numbers for booleans, and float64."""
    columns = tiny_columns()
    older = {key: columns[key] for key in ("observations", "next_observations", "actions", "timeouts")}
    older |= {"rewards": columns["rewards"][:, None], "terminals": columns["terminals"][:, None].astype(np.float32)}
    older["observations"] = older["observations"].astype(np.float64)
    arrays = read(write(tmp_path / "older.hdf5", older))
    assert set(arrays) == set(older)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, columns[key])
        assert array.dtype == columns[key].dtype


def nan_at(column: np.ndarray, row: int) -> np.ndarray:
    column = column.copy()
    column[row] = np.nan
    return column


@pytest.mark.parametrize(
    "key, fault, message",
    [
        ("actions", lambda column: None, "no array 'actions' .it holds .*observations"),
        ("timeouts", lambda column: None, "no array 'timeouts'"),
        ("observations", lambda column: nan_at(column, 7), "observations row 7 holds NaN"),
        ("rewards", lambda column: column.astype(np.float64) * 1e300, "rewards row 1 holds NaN or infinity"),
        ("rewards", lambda column: column[:-1], "arrays do not have the same number of rows.*rewards .11,"),
        ("next_observations", lambda column: column[:, :-1], "next_observations .12, 10. is not shaped"),
        ("observations", lambda column: column[:, 0], r"observations has shape \(12,\), expected .rows, numbers"),
        ("rewards", lambda column: column[:, None] + np.zeros(2, np.float32), r"rewards has shape \(12, 2\)"),
        ("actions", lambda column: np.full((12, 3), b"x"), "actions has type"),
        ("actions", lambda column: column * 0 + np.float32(1.001), r"actions row 0 lies outside \[-1, 1\]"),
        ("terminals", lambda column: column * 2, "terminals holds something other than 0 and 1"),
        ("timeouts", lambda column: column.astype(np.float32) * np.nan, "timeouts holds something other"),
    ],
)
def test_a_faulty_column_is_named(tmp_path, key, fault, message):
    columns = tiny_columns()
    columns[key] = fault(columns[key])
    path = write(tmp_path / "faulty.hdf5", {name: column for name, column in columns.items() if column is not None})
    with pytest.raises(UserError, match=f"faulty.hdf5: {message}"):
        read(path)


def test_damaged_files_are_one_line(tiny):
    good = tiny.read_bytes()
    length = len(good)
    for cut in (0, 1, 100, length // 2, length - 1):
        tiny.write_bytes(good[:cut])
        with pytest.raises(UserError, match="tiny.hdf5: not a readable HDF5 file, or cut short") as caught:
            read(tiny)
        assert "\n" not in str(caught.value)
    with h5py.File(write(tiny, tiny_columns())) as file:
        start = file["actions"].id.get_chunk_info(0).byte_offset
    tiny.write_bytes(good[:start] + b"\xff" * 20 + good[start + 20 :])  # inside the compressed numbers
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        read(tiny)
    with pytest.raises(UserError, match="no such file"):
        read(tiny.with_name("other.hdf5"))
    with pytest.raises(UserError, match="no such file"):
        read(tiny.parent)


def test_a_file_that_memory_has_no_room_for_is_not_called_damaged(tiny, monkeypatch):
    def load(*_, **__):
        raise MemoryError

    monkeypatch.setattr(h5py, "File", load)
    with pytest.raises(UserError, match="tiny.hdf5: does not fit in memory; use a smaller dataset"):
        read(tiny)


def test_episodes_end_at_falls_timeouts_jumps_and_the_end_of_the_file(tiny, monkeypatch, capsys):
    arrays, episode_ends = read(tiny), DATASETS[HOPPER].episode_ends
    assert episode_ends(arrays).tolist() == [4, 7, 11]
    assert whole_returns(arrays["rewards"], arrays["terminals"], episode_ends(arrays)).tolist() == [10.0, 18.0, 38.0]
    arrays["timeouts"][:] = False  # an end without a mark shows in the observations
    for rows in (1, 4, 5, ROWS - 1, ROWS):  # searched at a time
        monkeypatch.setattr(d4rl_utils, "BLOCK_ROWS", rows)
        assert episode_ends(arrays).tolist() == [4, 7, 11]
    assert not capsys.readouterr().err
    arrays["terminals"] = np.roll(arrays["terminals"], 1)
    assert len(episode_ends(arrays)) > 3 and "ends stand where the episode goes on" in capsys.readouterr().err


def load(dataset_id: str, folder: Path | None = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The columns, and the returns of whole episodes."""
    columns = find_dataset(dataset_id).transitions(folder)
    return {key: value for key, value in columns.items() if key not in ("env_id", "returns")}, columns["returns"]


def put(folder: Path, columns: dict[str, np.ndarray], dataset_id: str = HOPPER) -> Path:
    """The columns under the dataset's name in the folder, which is returned."""
    folder.mkdir(exist_ok=True)
    write(find_dataset(dataset_id).paths(folder)[0], columns)
    return folder


def many_columns(rows: int = 500, dims: tuple[int, int] = (11, 3)) -> dict[str, np.ndarray]:
    """Random rows with random ends: terminals, timeouts, some rows with both, some episodes of one row.

    An ant stays where it is, and its file has no next_observations, as the official ones.
    """
    rng = np.random.default_rng(1)
    columns = {
        "observations": rng.normal(size=(rows, dims[0])).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(rows, dims[1])).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": rng.random(rows) < 0.1,
        "timeouts": rng.random(rows) < 0.1,
    }
    if dims == ANT:
        columns["observations"][:, :2] = 0
        return columns
    ends = columns["terminals"] | columns["timeouts"]
    return columns | {"next_observations": np.roll(columns["observations"], -1, axis=0) + ends[:, None]}


def qlearning_dataset(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What D4RL's function of this name makes of a file with timeouts, row after row."""
    made = {key: [] for key in ("observations", "actions", "rewards", "next_observations", "terminated")}
    for row in range(len(columns["rewards"]) - 1):
        if columns["timeouts"][row]:
            continue
        for key in ("observations", "actions", "rewards"):
            made[key].append(columns[key][row])
        made["next_observations"].append(columns["observations"][row + 1])
        made["terminated"].append(bool(columns["terminals"][row]))
    return {key: np.array(values) for key, values in made.items()}


def test_rows_without_next_observations_become_d4rls_transitions(tmp_path, monkeypatch):
    columns = many_columns(dims=ANT)
    expected = qlearning_dataset(columns)
    for rows in (7, 1 << 16):  # blocks within blocks, and one for all
        monkeypatch.setattr(dataset_files, "BLOCK_ROWS", rows)
        got, _ = load(ANTMAZE, put(tmp_path / "data", columns, ANTMAZE))
        assert set(got) == {*expected, "truncated"}
        for key in ("observations", "actions", "rewards", "terminated"):
            np.testing.assert_array_equal(got[key], expected[key])
        going_on = ~expected["terminated"]
        np.testing.assert_array_equal(got["next_observations"][going_on], expected["next_observations"][going_on])
        # D4RL has another episode's state after a fall, here the state itself stands for the one that is not known.
        np.testing.assert_array_equal(got["next_observations"][~going_on], got["observations"][~going_on])


def test_next_observations_are_taken_where_they_are(tmp_path):
    columns = tiny_columns()
    columns["timeouts"][:] = False  # as medium-replay has it: the second episode's end shows in the observations alone
    got, returns = load(HOPPER, put(tmp_path / "data", columns))
    for key in ("observations", "actions", "rewards", "next_observations"):
        np.testing.assert_array_equal(got[key], columns[key])
        assert got[key].dtype == np.float32
    assert np.flatnonzero(got["terminated"]).tolist() == [4]
    assert np.flatnonzero(got["truncated"]).tolist() == [7, 11]
    assert returns.tolist() == [10.0]


def test_an_episode_cut_before_the_time_limit_is_not_whole(tmp_path):
    """Of 1000, 40, 1000 and 500 rows; and of 300, 300 and 40, which is another limit than D4RL's."""
    for lengths, whole in (((1000, 40, 1000, 500), [0, 2]), ((300, 300, 40), [0, 1])):
        columns = many_columns(sum(lengths))
        ends = np.cumsum(lengths) - 1
        columns["terminals"][:], columns["timeouts"] = False, np.isin(np.arange(sum(lengths)), ends)
        columns["next_observations"] = np.roll(columns["observations"], -1, axis=0)
        returns = load(HOPPER, put(tmp_path / "data", columns))[1]
        sums = [part.sum() for part in np.split(columns["rewards"].astype(np.float64), ends[:-1] + 1)]
        np.testing.assert_allclose(returns, np.array(sums)[whole])


def maze_columns() -> dict[str, np.ndarray]:
    """Two recordings of 6 rows; the first stays at the goal for two of them, and an unmarked jump follows the second.

    x: 0 .1 .2 .3 .4 .5 | 8 8.1 8.2 8.3 8.4 8.5 | 0 .1 .2
    """
    columns = many_columns(15, ANT)
    columns["observations"][:, 0] = np.r_[np.arange(6) * 0.1, 8 + np.arange(6) * 0.1, np.arange(3) * 0.1]
    columns["rewards"] = np.isin(np.arange(15), (3, 4)).astype(np.float32)
    columns["terminals"] = columns["rewards"] == 1
    columns["timeouts"] = np.arange(15) == 5
    return columns


def test_antmaze_recordings_go_on_at_the_goal(tmp_path):
    got, returns = load(ANTMAZE, put(tmp_path / "data", maze_columns(), ANTMAZE))
    assert len(got["rewards"]) == 12  # without the timeout's row 5, the jump's row 11 and the last
    assert np.flatnonzero(got["terminated"]).tolist() == [3, 4]
    assert np.flatnonzero(got["truncated"]).tolist() == [9, 11]
    assert np.abs(got["next_observations"][:, 0] - got["observations"][:, 0]).max() < 0.2
    assert returns.tolist() == [1.0, 0.0]  # an evaluation ends at the goal, so it counts once


def test_files_that_are_not_of_the_id(tmp_path):
    """Of another robot, without next_observations where the official file has them, and of single rows."""
    with pytest.raises(UserError, match=r"medium_replay-v2.hdf5: 17 observation and 6 action numbers a row, not"):
        load(HOPPER, put(tmp_path / "data", many_columns(dims=(17, 6))))
    columns = many_columns()
    del columns["next_observations"]
    with pytest.raises(UserError, match="no array 'next_observations', which tells where episodes end"):
        load(HOPPER, put(tmp_path / "data", columns))
    columns = many_columns(dims=ANT)
    columns["timeouts"][:] = True
    with pytest.raises(UserError, match="no two rows of one episode follow each other"):
        load(ANTMAZE, put(tmp_path / "data", columns, ANTMAZE))


@pytest.mark.parametrize("following", [True, False])
def test_loading_needs_little_more_memory_than_the_data(tmp_path, following):
    dataset_id = HOPPER if following else ANTMAZE
    folder = put(tmp_path / "data", many_columns(150_000, (11, 3) if following else ANT), dataset_id)
    tracemalloc.start()
    try:
        got, _ = load(dataset_id, folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = sum(4 * array.size for array in got.values())  # as float32
    assert peak < 1.2 * size, peak / size


@pytest.mark.parametrize(
    "dataset_id, env_id, sizes",
    [("hopper-random-v2", "Hopper-v4", (11, 3)), ("walker2d-full-replay-v2", "Walker2d-v4", (17, 6))],
)
def test_environments_are_v4_and_made_without_noise(dataset_id, env_id, sizes, tmp_path, monkeypatch, capfd, recwarn):
    mujoco = pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)
    handler = mujoco.get_mju_user_warning()
    env = make_env(dataset_id)
    assert (env.spec.id, env.spec.max_episode_steps) == (env_id, d4rl_utils.MAX_EPISODE_STEPS)
    assert (env.observation_space.shape, env.action_space.shape) == ((sizes[0],), (sizes[1],))
    # Neither warnings, nor MuJoCo's own on stderr, nor the log file that it keeps in the working folder.
    assert not list(recwarn) and capfd.readouterr().err == "" and not list(tmp_path.iterdir())
    assert mujoco.get_mju_user_warning() is handler
