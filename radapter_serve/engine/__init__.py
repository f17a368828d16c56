"""Releases in this process: the tasks, wired to runtimes, asked as a server is asked.

`Engine` is a `Transport` of the client, and the gateway can stand in front of it as in front of
Triton. It needs neither torch nor tritonserver.
"""
