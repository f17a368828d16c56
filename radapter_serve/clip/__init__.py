"""The base model in torch: loading it, its two towers, its dense features, its prompts.

What is fine-tuned lives in `adapter/`; nothing here knows of releases or servers.
"""
