"""The base model in torch: loading, the two towers, dense features and prompts.

Fine-tuned weights are in `adapter/`; this package does not depend on releases or servers.
"""
