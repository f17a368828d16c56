"""What a release is: its facts, its place in a model repository, and the samples that prove what it
computes.

Nothing here runs a graph, and nothing imports torch.
"""
