"""A run of one process opens no port to other machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LISTENING = """
import os
from pathlib import Path
from omnimem.cli.environment import prepare_process
prepare_process()
from omnimem.run import RunFolder
from omnimem.training.arguments import training_arguments
assert training_arguments({"max_steps": 1}, RunFolder(path=Path("runs"))).world_size == 1
links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
own = {str(link.readlink()) for link in links if link.is_symlink()}
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        parts = line.split()
        if parts[3] == "0A" and f"socket:[{parts[9]}]" in own:
            print("listens on", parts[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net")
def test_one_process_listens_on_the_loopback_only(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LISTENING]
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # other tests may have set them
    alone = {name: value for name, value in os.environ.items() if name not in ranks}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=alone)
    places = [line.split()[-1].partition(":")[0] for line in done.stdout.splitlines() if line.startswith("listens on")]
    assert set(places) <= {"0100007F"}, done.stdout
