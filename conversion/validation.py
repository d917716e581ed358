"""Whether a stranger can load a folder: tried in a process of its own, where this package is not importable."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from conversion.key_maps import ConversionError


_SCRIPT = Path(__file__).with_name("clean_process.py")
# Their settings, and credentials, are not a stranger's.
_LEFT_OUT = ("PYTHON", "HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")


def validate(folder: Path) -> dict[str, Any]:
    """Load configuration, model, processor and tokenizer with `trust_remote_code`, generate a token and, for Transfusion,
    a picture of two steps; on the CPU, offline, from an empty folder and with empty caches.

    Returns:
        `model`, `parameters`, `token` and, for Transfusion, `picture` (its shape).

    Raises:
        ConversionError: with the last lines of what went wrong.
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
