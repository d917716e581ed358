"""Try whether a stranger can load a folder, in a process that cannot import this package."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from conversion.key_maps import ConversionError


_SCRIPT = Path(__file__).with_name("clean_process.py")
# Variables of the environment that a stranger does not have: settings and credentials.
_LEFT_OUT = ("PYTHON", "HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")


def validate(folder: Path) -> dict[str, Any]:
    """Load a folder as a stranger does, and use it once.

    The process loads configuration, model, processor and tokenizer with `trust_remote_code`, and generates a token and,
    for Transfusion, a picture of two steps. It runs on the CPU, offline, from an empty folder, with empty caches.

    Returns:
        `model`, `parameters`, `token` and, for Transfusion, `picture` (its shape).

    Raises:
        ConversionError: the process failed; the message holds its last lines.
    """
    with tempfile.TemporaryDirectory() as workspace:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_OUT)}
        environment |= {"HF_HOME": f"{workspace}/home", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        empty = Path(workspace, "empty")
        empty.mkdir()
        result = subprocess.run(
            [sys.executable, "-I", str(_SCRIPT), str(folder.resolve())],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
        )
    if result.returncode:
        last = "\n  ".join(result.stderr.strip().splitlines()[-3:])
        raise ConversionError(f"{folder} does not load in a process without this package:\n  {last}")
    return json.loads(result.stdout.strip().splitlines()[-1])
