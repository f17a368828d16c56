"""Environment variables that pass a server's settings to its processes."""

from __future__ import annotations

import os

THREADS = "RADAPTER_THREADS"  # number of threads that compute in an encoder
INDEXES = "RADAPTER_INDEXES"  # folder of the indexes that the task `retrieve` searches
SURPLUS = "RADAPTER_SURPLUS"  # folder of the files that say how many requests a model rejects
LABELS = "RADAPTER_LABELS"  # file in which the processes of a server share labels' embeddings
LABELS_FILE = "labels.sqlite"  # its name in a server's folder
PULSE = "RADAPTER_PULSE"  # number of the open pipe into which a gateway writes that it lives
# Where traces go by OTLP, as OpenTelemetry names it; the second is for the full path.
OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def otlp_endpoint() -> str | None:
    """Name the variable that says where traces go; None if nothing is traced."""
    for name in OTLP_ENDPOINTS:
        if os.environ.get(name):
            return name
    return None
