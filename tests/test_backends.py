"""docs/backends.md: what the engine computes, against what the backends of the pinned llama.cpp have."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_is_current():
    """A scorer with another operation, or another release of llama.cpp, changes it: look at it before you write it anew."""
    done = subprocess.run([sys.executable, ROOT / "scripts" / "backend_ops", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_operation_runs_on_every_device():
    """In some types and layouts at least: what a device never has would be copied to the CPU and back."""
    lines = [line for line in (ROOT / "docs" / "backends.md").read_text().splitlines() if line.startswith("| `")]
    assert len(lines) > 25 and {"FLASH_ATTN_EXT", "SOFT_MAX", "SET_ROWS"} <= {line.split("`")[1] for line in lines}
    assert not [line for line in lines if "**no**" in line]
