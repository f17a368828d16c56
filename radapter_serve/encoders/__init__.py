"""Loaded releases: encoder, tokenizer and label sets.

An encoder runs the release's graphs with ONNX Runtime, OpenVINO or TensorRT, or calls a live
server. Rows of concurrent callers are encoded together. Nothing here depends on tasks, and nothing
imports torch.
"""
