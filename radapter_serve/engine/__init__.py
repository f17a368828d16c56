"""Runs the tasks of releases in this process, with the interface of a server.

`Engine` is a `Transport` of the client, and serves as the gateway's upstream instead of Triton. It
needs neither torch nor tritonserver.
"""
