"""What the tests of several commands share."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runs import chain, policy
from runs.cli import run_cli


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def error_line(
    main: Callable, capsys: pytest.CaptureFixture, *flags: object, code: int = 2, starts: str = "error"
) -> str:
    """Run a command's `main` in this process; it must exit with `code` and one line on stderr, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda _: main(list(map(str, flags))))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith((starts, "Traceback"))]
    assert stop.value.code == code and len(lines) == 1, lines
    return lines[0]


@contextlib.contextmanager
def short_chain_episodes(steps: int) -> Iterator[pytest.MonkeyPatch]:
    """Episodes of chains are cut after a few steps, so that an evaluation takes no time."""
    make = chain.make_env

    def shortened(*arguments):
        env = make(*arguments)
        env._limit = steps
        return env

    with pytest.MonkeyPatch.context() as patch:
        for module in (chain, policy):
            patch.setattr(module, "make_env", shortened)
        yield patch
