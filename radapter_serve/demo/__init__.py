"""`radapter-demo`: a small base model, emoji drawings of several vendors, and every step from data
to answer. Nothing else imports it.
"""
