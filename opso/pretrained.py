"""The model that a run of offline_trainer.py leaves, for the online stage."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from model import OfflineModel
from offline_agent import build_model
from runs.directory import expecting, load_checkpoint
from utils import UserError


def load_pretrained(config: Any) -> tuple[OfflineModel, dict[str, Any]]:
    """The last EMA model of the run that the settings of online_trainer.py ask for, and that run's settings.

    Raises UserError, naming the command that makes the right one, where there is none, and where it is another
    dataset's or not a model of ours.
    """
    dataset, usual = config.dataset, Path("logs") / "offline" / config.dataset / f"seed_{config.seed}"
    remedy = f"make it with `python offline_trainer.py --dataset {dataset} --seed {config.seed}`"
    path = Path(config.offline_run_dir or usual) / "checkpoints" / "last.pth"
    if not path.exists():
        raise UserError(path.resolve(), "no pretrained model", f"{remedy}, or give its folder by --offline_run_dir")
    state = load_checkpoint(path)
    if state.get("dataset") != dataset:
        fault = f"pretrained on {state.get('dataset')}, not on {dataset}"
        raise UserError(path, fault, f"give a run of `python offline_trainer.py --dataset {dataset}`")
    with expecting(path, "a model of offline_trainer.py", remedy):
        settings = state["config"]
        model = build_model(state["observation_dim"], SimpleNamespace(**settings))
        model.load_state_dict(state["agent"]["target"])
        settings["discount"], settings["hidden_dim"], settings["max_trajectories"]  # noqa: B018  the run needs them
    if not (path.parents[1] / "finished.json").exists():
        print(
            f"{path.parents[1]}: this pretraining is not finished; what it has learned so far is used", file=sys.stderr
        )
    return model, settings
