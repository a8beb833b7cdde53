"""Running an experiment: command line, a run and its directory, metrics, evaluation, plots, the chain's loop."""

import os
import signal
import sys
from typing import Any


def tell_ctrl_c() -> None:
    """Make Ctrl-C one line and exit code 130 in a command's imports, which take seconds: call it before them.

    An exception there is caught by some packages, which then go on half imported. `run_cli` puts an end to it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_at_once)


def exit_at_once(*_: Any) -> None:
    """What Ctrl-C does in imports."""
    print("interrupted: nothing was saved", file=sys.stderr, flush=True)
    os._exit(130)
