"""The environment variables by which the processes of a server learn its settings."""

THREADS = "RADAPTER_THREADS"  # how many threads an encoder computes with
INDEXES = "RADAPTER_INDEXES"  # the folder of the indexes that the task `retrieve` searches
SURPLUS = (  # the folder of files that say how many waiting requests a model is to refuse
    "RADAPTER_SURPLUS"
)
LABELS = "RADAPTER_LABELS"  # the file in which the processes of a server keep labels' embeddings
LABELS_FILE = "labels.sqlite"  # its name in a server's folder
