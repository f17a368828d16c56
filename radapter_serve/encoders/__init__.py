"""A loaded release: its encoder, wherever it runs, its tokenizer and its label sets.

An encoder is the release's graphs by ONNX Runtime, OpenVINO or TensorRT, or a live server. What
several callers need at once is encoded together. Nothing here knows of tasks, and nothing imports
torch.
"""
