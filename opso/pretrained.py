"""The model that a run of offline_trainer.py leaves, for the online stage."""

import sys
from pathlib import Path
from typing import Any

from model import OfflineModel
from opso.policy import build_model
from runs.directory import load_checkpoint
from utils import UserError


def load_pretrained(
    folder: Path, which: str, dataset: str, command: str, command_here: str
) -> tuple[OfflineModel, dict[str, Any]]:
    """The EMA model of the run in a folder, its last or its best one, and that run's settings.

    Raises UserError, naming the command that makes the right one (`command`, or `command_here` in this very folder),
    where there is none, where it is another dataset's or not a model of ours, and where it lacks its normaliser.
    """
    path = folder / ("checkpoints/last.pth" if which == "last" else "best_model.pth")
    remedy = f"make it with `{command_here}`"
    if not path.exists():
        raise UserError(f"{path}: no pretrained model; {remedy}")
    state = load_checkpoint(path)
    if state.get("dataset") != dataset:
        other = "" if command == command_here else ", and leave --offline_run_dir out"
        raise UserError(
            f"{path}: pretrained on {state.get('dataset')}, not on {dataset}; make it with `{command}`{other}"
        )
    try:
        weights = state["agent"]["target"] if which == "last" else state["target"]
        settings = state["config"]
        model = build_model(state["observation_dim"], settings)
        absent = [f"encoder.{name}" for name in ("mean", "std") if f"encoder.{name}" not in weights]
        if absent:
            raise UserError(f"{path}: holds no normaliser ({', '.join(absent)} absent); {remedy}")
        model.load_state_dict(weights)
        settings["discount"], settings["hidden_dim"], settings["max_trajectories"]  # noqa: B018  the run needs them
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a model of offline_trainer.py ({reason}); {remedy}") from None
    if not 0 < settings["discount"] < 1:
        raise UserError(f"{path}: pretrained with --discount {settings['discount']}, which counts no steps; {remedy}")
    if not (folder / "finished.json").exists():
        print(f"{folder}: this pretraining is not finished; what it has learned so far is used", file=sys.stderr)
    return model, settings
