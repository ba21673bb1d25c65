"""Tests of orchestratorctl against a stub of the admin API on a real unix socket.

Nothing sleeps: the stub plays its script as the client reads, and a test waits for the text that it expects.
"""
