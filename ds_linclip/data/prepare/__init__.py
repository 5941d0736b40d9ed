"""Commands that write training shards and inspect them."""
