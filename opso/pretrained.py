"""The model that a run of offline_trainer.py leaves, for the online stage."""

import sys
from pathlib import Path
from typing import Any

from model import OfflineModel
from opso.policy import build_model
from runs.directory import load_checkpoint
from utils import UserError, one_line


def load_pretrained(folder: Path, dataset: str, command: str) -> tuple[OfflineModel, dict[str, Any]]:
    """The last EMA model of the run in a folder, and that run's settings.

    Raises UserError, naming the command that makes the right one, where there is none, and where it is another
    dataset's or not a model of ours.
    """
    path, remedy = folder / "checkpoints" / "last.pth", f"make it with `{command}`"
    if not path.exists():
        raise UserError(path.resolve(), "no pretrained model", f"{remedy}, or give its folder by --offline_run_dir")
    state = load_checkpoint(path)
    if state.get("dataset") != dataset:
        fault = f"pretrained on {state.get('dataset')}, not on {dataset}"
        raise UserError(path, fault, f"give a run of `python offline_trainer.py --dataset {dataset}`")
    try:
        settings = state["config"]
        model = build_model(state["observation_dim"], settings)
        model.load_state_dict(state["agent"]["target"])
        settings["discount"], settings["hidden_dim"], settings["max_trajectories"]  # noqa: B018  the run needs them
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(path, f"not a model of offline_trainer.py ({one_line(error)})", remedy) from None
    if not (folder / "finished.json").exists():
        print(f"{folder}: this pretraining is not finished; what it has learned so far is used", file=sys.stderr)
    return model, settings
