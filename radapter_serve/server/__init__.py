"""tritonserver as a process: found, started with the right settings and runtimes, watched and
stopped.

The answers come from `tasks/`; nothing here imports torch.
"""
