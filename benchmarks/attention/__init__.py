"""Time of the attention operators over the number of tokens."""
