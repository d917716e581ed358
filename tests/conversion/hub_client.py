"""`python -m conversion.push` again and again in one process, which knows no Hub but a server of the tests."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conversion.hub_server import HubServer


ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    code: int
    output: str
    errors: str


class HubClient:
    """Importing takes seconds, a push of a tiny model a tenth of one: so one process serves all tests."""

    def __init__(self, hub: HubServer, home: Path):
        self.hub, self.home = hub, home
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.conversion.hub_client"],
            cwd=ROOT,
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def environment(self, account: str | None = "ada") -> dict[str, str]:
        return os.environ | self.hub.environment(self.home, account)

    def push(self, *arguments, account: str | None = "ada", **variables: str) -> Result:
        """Run the command with the token of an account."""
        changed = self.hub.environment(self.home, account) | variables
        print(json.dumps([list(map(str, arguments)), changed]), file=self._process.stdin, flush=True)
        return Result(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def serve() -> None:
    from conversion.push import main

    answers = sys.stdout
    for line in sys.stdin:
        arguments, changed = json.loads(line)
        os.environ.update(changed)
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(arguments)
        print(json.dumps([code, output.getvalue(), errors.getvalue()]), file=answers, flush=True)


if __name__ == "__main__":
    serve()
