"""Conditions that must hold before Ray is started."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.training_processes import REPOSITORY


def test_the_driver_imports_no_ray_before_it_has_said_where_ray_may_listen():
    """Ray reads `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER` at its import: loaded earlier, it listens on
    every interface of the machine."""
    script = (
        "import sys, cluster.train, cluster.launch.controller, cluster.launch.measurement\n"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0
