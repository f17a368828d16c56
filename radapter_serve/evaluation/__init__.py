"""How good a model is, at any α: classification, retrieval and segmentation, measured and drawn.

Three layers: a `Candidate` is a loaded release at one α, in torch, in a runtime or on a server; an
`EvaluationSet` asks candidates about its images and measures their answers; a `Row` is what was
measured of one candidate on one set. `run` goes through a suite, `Results` keeps the rows, `choose`
picks α from those of validation sets, and `plots` draws them. `start` has the function `evaluate`.
"""
