"""The small base model of `radapter-demo`, and its data: emoji drawings of several vendors."""
