"""Code inside tritonserver: the task models, and the backends that run graphs.

The modules import `triton_python_backend_utils`, which exists in tritonserver's processes only;
except `backlog`, which the process of radapter-serve imports, too.
"""
