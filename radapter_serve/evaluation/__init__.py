"""Evaluation of a model at any α: classification, retrieval and segmentation, with plots.

Three layers: a `Candidate` is a loaded release at one α, in torch, in a runtime or on a server; an
`EvaluationSet` asks candidates about its images and measures their answers; a `Row` holds the
metrics of one candidate on one set. `run` evaluates a suite, `Results` stores the rows, `choose`
picks α from the rows of validation sets, and `plots` draws them. `start` has `evaluate`.
"""
