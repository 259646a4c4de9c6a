"""Tests. The import comes before any of torch: it says how OpenMP's threads wait."""

import cluster  # noqa: F401
