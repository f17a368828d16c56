"""Runs tritonserver as a child process: finds it, starts it with the right settings and runtimes,
watches and stops it.

The answers come from `tasks/`; nothing here imports torch.
"""
