"""How good a model is, at any α: classification, retrieval and segmentation, measured and drawn.

A model is an adapter in torch, a merged checkpoint, a release or a live server: each has an
`Embedder`. A suite names
data sets: `open_set` opens each as an `EvaluationSet`. `evaluate` measures models on one set, and
`evaluate_suite` on all of them; `Results` keeps the rows, `choose` picks α from those of validation
sets, and `plots` draws them.
"""
