"""The task models, a module each; `model_repository/NAME/model.py` names the class of one to
Triton.
"""
