"""Whether OpenMP's threads should sleep or spin while they wait: images/s of training steps, each
way in turn.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import tyro

CHILD = """
import sys
from training_step import Step
batch, steps = int(sys.argv[2]), int(sys.argv[3])
step = Step("weight form, full rank", sys.argv[1], batch)
step(0)
print(batch * steps / sum(step(seed) for seed in range(1, steps + 1)))
"""


def main(architecture: str = "ViT-B-32", batch: int = 32, steps: int = 5, repeats: int = 5) -> None:
    """Print images/s with OMP_WAIT_POLICY unset and with PASSIVE, in processes of their own, as
    torch reads it once.

    Args:
        architecture: open_clip architecture, with random weights and full-rank adapters.
        batch: images a step.
        steps: that are timed in each process, after one that is not.
        repeats: rounds, each of which has both ways, in alternating order.
    """
    found: dict[str, list[float]] = {"unset": [], "PASSIVE": []}
    for number in range(repeats):
        for policy in list(found)[:: -1 if number % 2 else 1]:
            environment = {
                name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"
            }
            if policy != "unset":
                environment["OMP_WAIT_POLICY"] = policy
            command = [sys.executable, "-c", CHILD, architecture, str(batch), str(steps)]
            done = subprocess.run(
                command,
                cwd=Path(__file__).parent,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            found[policy].append(float(done.stdout))
            print(f"round {number + 1}, {policy}: {found[policy][-1]:.2f} images/s", flush=True)
    for policy, rates in found.items():
        print(
            f"{policy}: median {statistics.median(rates):.2f} images/s, {min(rates):.2f} to"
            f" {max(rates):.2f}"
        )


if __name__ == "__main__":
    tyro.cli(main)
