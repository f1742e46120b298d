"""Single-head attention over the tokens of one feature map."""
