"""Settings of the whole suite."""

import os

from hypothesis import HealthCheck, settings

# No deadline: speed is measured in benchmarks, and a busy machine must not fail a proof. In CI the
# examples are always the same, so that a red run means a change.
settings.register_profile(
    "suite", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
