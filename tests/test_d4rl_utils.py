"""D4RL's ids, folders and files: what is read, what is refused and with which words, and the environments."""

from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest

import d4rl_utils
from d4rl_utils import (
    GENERATED_IDS,
    dataset_path,
    episode_ends,
    episode_returns,
    load_arrays,
    make_env,
    manifest_path,
    official_ids,
    parse_dataset_id,
)
from utils import UserError

ROWS = 12


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


# --- ids and folders -------------------------------------------------------------------------------------------------


def test_ids_are_d4rls_and_the_local_ones():
    assert len(official_ids()) == 18 and len(GENERATED_IDS) == 9
    for name in (*official_ids(), *GENERATED_IDS):
        dataset = parse_dataset_id(name)
        assert (dataset.id, dataset.local) == (name, name.startswith("local/"))
        assert dataset.file_name == dataset.name.removesuffix("-v2").replace("-", "_") + "-v2.hdf5"
        assert (dataset.url is None) == dataset.local
    url = parse_dataset_id("walker2d-full-replay-v2").url
    assert url == "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/walker2d_full_replay-v2.hdf5"


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("hopper-medum-v2", "hopper-medium-v2"),
        ("local/hopper-expert-v2", "local/hopper-medium-expert-v2"),
        ("hopper-medium-v0", "hopper-medium-v2"),
        ("../hopper-medium-v2", "hopper-medium-v2"),
        ("", ""),
        (None, "hopper"),
    ],
)
def test_an_unknown_id_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"did you mean '{nearest}.*local/<id>"):
        parse_dataset_id(name)


def test_folders(tmp_path, monkeypatch, repository):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    official, local = "hopper-medium-replay-v2", "local/hopper-medium-replay-v2"
    file = "hopper_medium_replay-v2.hdf5"
    assert dataset_path(official) == tmp_path / "home/.d4rl/datasets" / file
    assert dataset_path(local) == repository / "datasets/local" / file
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "variable"))
    assert dataset_path(official) == tmp_path / "variable" / file
    assert dataset_path(local) == tmp_path / "variable/local" / file
    assert dataset_path(official, tmp_path) == tmp_path / file
    assert manifest_path(local, "~/data") == tmp_path / "home/data/local/hopper_medium_replay-v2.json"


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was_written(tiny):
    arrays, columns = load_arrays(tiny), tiny_columns()
    assert set(arrays) == {key for key in columns if not key.startswith("infos/")}
    states = load_arrays(tiny, states=True)
    assert set(states) == set(columns)
    for key, array in states.items():
        np.testing.assert_array_equal(array, columns[key])
        kind = bool if key in ("terminals", "timeouts") else np.float64 if key.startswith("infos/") else np.float32
        assert array.dtype == kind


def test_what_d4rls_loader_takes_is_taken(tmp_path):
    """Columns of shape [rows, 1], numbers for booleans, float64, and no optional columns."""
    columns = tiny_columns()
    older = {key: columns[key] for key in ("observations", "actions")}
    older |= {"rewards": columns["rewards"][:, None], "terminals": columns["terminals"][:, None].astype(np.float32)}
    older["observations"] = older["observations"].astype(np.float64)
    arrays = load_arrays(write(tmp_path / "older.hdf5", older))
    assert set(arrays) == set(older)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, columns[key])
        assert array.dtype == columns[key].dtype
    with pytest.raises(UserError, match="no array 'infos/qpos'"):
        load_arrays(tmp_path / "older.hdf5", states=True)


def nan_at(column: np.ndarray, row: int) -> np.ndarray:
    column = column.copy()
    column[row] = np.nan
    return column


@pytest.mark.parametrize(
    "key, fault, message",
    [
        ("actions", lambda column: None, "no array 'actions' .it holds .*observations"),
        ("terminals", lambda column: None, "no array 'terminals'"),
        ("observations", lambda column: nan_at(column, 7), "observations row 7 holds NaN"),
        ("next_observations", lambda column: nan_at(column, 11), "next_observations row 11 holds NaN"),
        ("rewards", lambda column: nan_at(column, 3), "rewards row 3 holds NaN"),
        ("rewards", lambda column: column.astype(np.float64) * 1e300, "rewards row 1 holds NaN or infinity"),
        ("infos/qvel", lambda column: nan_at(column, 2), "infos/qvel row 2 holds NaN"),
        ("rewards", lambda column: column[:-1], "arrays do not have the same number of rows.*rewards .11,"),
        ("infos/qpos", lambda column: column[:-2], "arrays do not have the same number of rows.*infos/qpos .10,"),
        (
            "timeouts",
            lambda column: np.append(column, True),
            "arrays do not have the same number of rows.*timeouts .13,",
        ),
        ("next_observations", lambda column: column[:, :-1], "next_observations .12, 10. is not shaped"),
        ("observations", lambda column: column[:, 0], r"observations has shape \(12,\), expected .rows, numbers"),
        ("rewards", lambda column: column[:, None] + np.zeros(2, np.float32), r"rewards has shape \(12, 2\)"),
        ("observations", lambda column: np.zeros((12, 11), dtype=np.int64), "observations has type int64"),
        ("actions", lambda column: np.full((12, 3), b"x"), "actions has type"),
        ("actions", lambda column: column * 0 + np.float32(1.001), r"actions row 0 lies outside \[-1, 1\]"),
        ("terminals", lambda column: column * 2, "terminals holds something other than 0 and 1"),
        ("timeouts", lambda column: column.astype(np.float32) * np.nan, "timeouts holds something other"),
        ("terminals", lambda column: np.zeros((12, 2), dtype=bool), r"terminals has shape \(12, 2\)"),
    ],
)
def test_a_faulty_column_is_named(tmp_path, key, fault, message):
    columns = tiny_columns()
    columns[key] = fault(columns[key])
    path = write(tmp_path / "faulty.hdf5", {name: column for name, column in columns.items() if column is not None})
    with pytest.raises(UserError, match=f"faulty.hdf5: {message}"):
        load_arrays(path, states=True)


def test_a_group_where_an_array_belongs(tmp_path):
    columns = tiny_columns()
    columns["actions/inner"] = columns.pop("actions")
    with pytest.raises(UserError, match="actions has type a group"):
        load_arrays(write(tmp_path / "group.hdf5", columns))


def test_no_rows(tmp_path):
    columns = {key: column[:0] for key, column in tiny_columns().items()}
    with h5py.File(tmp_path / "empty.hdf5", "w") as file:
        for key, column in columns.items():
            file[key] = column
    with pytest.raises(UserError, match="empty.hdf5: arrays do not have the same number of rows"):
        load_arrays(tmp_path / "empty.hdf5")


def test_damaged_files_are_one_line(tiny):
    good = tiny.read_bytes()
    length = len(good)
    for cut in (0, 1, 100, length // 2, length - 1):
        tiny.write_bytes(good[:cut])
        with pytest.raises(UserError, match="tiny.hdf5: not a readable HDF5 file, or cut short") as caught:
            load_arrays(tiny)
        assert "\n" not in str(caught.value)
    with h5py.File(write(tiny, tiny_columns())) as file:
        start = file["actions"].id.get_chunk_info(0).byte_offset
    tiny.write_bytes(good[:start] + b"\xff" * 20 + good[start + 20 :])  # inside the compressed numbers
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        load_arrays(tiny)
    with pytest.raises(UserError, match="no such file"):
        load_arrays(tiny.with_name("other.hdf5"))
    with pytest.raises(UserError, match="no such file"):
        load_arrays(tiny.parent)


KEYS = ("observations", "timeouts", "infos/qvel")
ELSEWHERE = [(key, kind) for key in KEYS for kind in ("soft", "external", "virtual", "raw")]


@pytest.mark.parametrize("key, kind", [*ELSEWHERE, ("infos", "soft"), ("infos", "external")])
def test_nothing_outside_the_file_is_read(tmp_path, key, kind):
    """Links and arrays that a file keeps elsewhere are refused before anything of them is opened."""
    columns = tiny_columns()
    path, other = write(tmp_path / "tiny.hdf5", columns), write(tmp_path / "other.hdf5", columns)
    with h5py.File(path, "r+") as file:
        del file[key]
        if kind == "soft":
            file[key] = h5py.SoftLink("/actions")
        elif kind == "external":
            file[key] = h5py.ExternalLink(str(other), key)
        elif kind == "virtual":
            layout = h5py.VirtualLayout(columns[key].shape, columns[key].dtype)
            layout[:] = h5py.VirtualSource(str(other), key, columns[key].shape)
            file.create_virtual_dataset(key, layout)
        else:
            shape, dtype = columns[key].shape, columns[key].dtype
            file.create_dataset(key, shape, dtype, external=[(str(tmp_path / "raw"), 0, columns[key].nbytes)])
    words = "is a link" if kind in ("soft", "external") else "keeps its numbers in another file"
    for states in (False, True):
        with pytest.raises(UserError, match=f"tiny.hdf5: {key} {words}"):
            load_arrays(path, states=states)


def no_reading(monkeypatch):
    def read(*arguments):
        raise AssertionError("an array was read before all were checked")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", read)


def test_what_arrays_declare_is_checked_before_one_is_read(tiny, monkeypatch):
    no_reading(monkeypatch)
    for key, shape, words in (
        ("next_observations", (10**12, 11), "do not have the same number of rows"),
        ("next_observations", (ROWS, 10**12), "next_observations .12, 1000000000000. is not shaped"),
        ("timeouts", (ROWS, 10**12), "timeouts has shape"),
        ("infos/qpos", (10**12, 6), "do not have the same number of rows"),
        ("observations", (ROWS, 10**12), "is not shaped as the observations"),
        ("actions", (ROWS, 10**9), "actions declares .12, 1000000000., which the 0 bytes in the file cannot hold"),
    ):
        with h5py.File(write(tiny, tiny_columns()), "r+") as file:
            kind = file[key].dtype
            del file[key]
            file.create_dataset(key, shape, kind, chunks=True)
        with pytest.raises(UserError, match=words):
            load_arrays(tiny)


def test_arrays_larger_than_the_memory_are_refused(tiny, monkeypatch):
    no_reading(monkeypatch)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 512, "SC_PHYS_PAGES": 2}[name])
    with pytest.raises(UserError, match="tiny.hdf5: its arrays take .* GB, more than the .* GB here; use a smaller"):
        load_arrays(tiny)


# --- episodes --------------------------------------------------------------------------------------------------------


def test_episodes_end_at_falls_timeouts_jumps_and_the_end_of_the_file(tiny):
    arrays = load_arrays(tiny)
    assert episode_ends(arrays).tolist() == [4, 7, 11]
    assert episode_returns(arrays["rewards"], episode_ends(arrays)).tolist() == [10.0, 18.0, 38.0]
    arrays["timeouts"][:] = False  # an end without a mark shows in the observations
    assert episode_ends(arrays).tolist() == [4, 7, 11]
    del arrays["next_observations"], arrays["timeouts"]
    assert episode_ends(arrays).tolist() == [4, 11]


def test_jumps_are_found_across_the_chunks_of_the_search(tiny, monkeypatch):
    arrays = load_arrays(tiny)
    arrays["terminals"][:] = arrays["timeouts"][:] = False
    for rows in (1, 4, 5, ROWS - 1, ROWS):
        monkeypatch.setattr(d4rl_utils, "_CHECK_ROWS", rows)
        assert episode_ends(arrays).tolist() == [4, 7, 11]


# --- environments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset_id, env_id, sizes",
    [
        ("hopper-random-v2", "Hopper-v4", (11, 3)),
        ("local/halfcheetah-medium-v2", "HalfCheetah-v4", (17, 6)),
        ("walker2d-full-replay-v2", "Walker2d-v4", (17, 6)),
    ],
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


def test_a_gymnasium_without_v4(monkeypatch):
    def make(*arguments, **options):
        raise gymnasium.error.VersionNotFound("gone")

    monkeypatch.setattr(gymnasium, "make", make)
    with pytest.raises(UserError, match="Hopper-v4 is not in the installed gymnasium .*requirements.txt"):
        make_env("hopper-medium-v2")
