"""Time and memory of attention, blocks and towers over the number of tokens."""
