"""What torch and every server must do alike: preprocessing, tokenizer, labels, templates,
error codes and the α of a request.

numpy and Pillow only: neither torch nor a runtime belongs here.
"""
