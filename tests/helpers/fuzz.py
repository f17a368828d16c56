"""How random requests are drawn: a few for each operation, and the same ones each time."""

import hypothesis

FUZZ = hypothesis.settings(
    max_examples=25,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
