"""The code inside tritonserver: the task models, and the backends that run graphs.

Its modules import `triton_python_backend_utils`, which exists in the processes of tritonserver
alone; `backlog` does not, because the server writes what the processes read.
"""
