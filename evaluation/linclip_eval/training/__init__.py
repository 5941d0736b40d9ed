"""What a run scores while it trains."""
