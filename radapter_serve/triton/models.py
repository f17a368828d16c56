"""The modules that the tasks of a release of version 1.0.0 import, one of each name."""

import sys

from radapter_serve.release.release import TASKS
from radapter_serve.triton import task_model

for _task in TASKS:
    sys.modules[f"{__name__}.{_task}"] = task_model
