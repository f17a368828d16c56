"""The environment variables by which the processes of a server learn its settings."""

from __future__ import annotations

import os

THREADS = "RADAPTER_THREADS"  # how many threads an encoder computes with
INDEXES = "RADAPTER_INDEXES"  # the folder of the indexes that the task `retrieve` searches
SURPLUS = (  # the folder of files that say how many waiting requests a model is to refuse
    "RADAPTER_SURPLUS"
)
LABELS = "RADAPTER_LABELS"  # the file in which the processes of a server keep labels' embeddings
LABELS_FILE = "labels.sqlite"  # its name in a server's folder
PULSE = "RADAPTER_PULSE"  # the number of the open pipe into which a gateway writes that it lives
# Where traces go by OTLP, as OpenTelemetry names it; the second is for the full path.
OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def otlp_endpoint() -> str | None:
    """The variable that says where traces go; None where none does, so that nobody is followed."""
    for name in OTLP_ENDPOINTS:
        if os.environ.get(name):
            return name
    return None
