"""tritonserver as a process: found, started with the right settings and runtimes, watched and
stopped.

What it answers lives in `tasks/`; nothing here imports torch.
"""
