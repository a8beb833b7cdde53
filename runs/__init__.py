"""Running an experiment: command line, a run and its directory, metrics, evaluation, plots, the chain's loop."""

import os
import sys
from typing import Any


def tell_ctrl_c() -> None:
    """Make Ctrl-C one line and exit code 130 even in a command's imports, which take seconds: call it before them."""

    def tell(kind: type[BaseException], *more: Any) -> None:
        if kind is not KeyboardInterrupt:
            return sys.__excepthook__(kind, *more)
        print("interrupted: nothing was saved", file=sys.stderr, flush=True)
        os._exit(130)

    sys.excepthook = tell
