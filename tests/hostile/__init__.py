"""Hostile requests against the gateway: made by number from a seed, sent over plain sockets, judged by what comes back."""
