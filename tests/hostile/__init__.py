"""Hostile requests for the gateway: made by number from a seed, sent over plain sockets, and
judged.
"""
