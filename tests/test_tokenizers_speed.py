"""How fast patch PCA is fitted, against products of matrices on the same machine."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_fit_runs_at_half_the_rate_of_a_product_in_float64():
    """On one thread: several that other programs interrupt wait for each other."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "MKL", "OMP")}
    paths = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "pca_speed.py")],
        env=os.environ | threads | paths,
        capture_output=True,
        text=True,
        check=True,
    )
    ratios = json.loads(done.stdout)
    assert len(ratios) == 5
    assert statistics.median(ratios) / 2 > 0.5
