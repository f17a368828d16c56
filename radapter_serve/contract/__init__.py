"""The contract of torch and every server: preprocessing, tokenizer, labels, templates, error codes
and the α of a request.

It needs numpy and Pillow, but neither torch nor a runtime.
"""
