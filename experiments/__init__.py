"""Studies that train several models; run from the repository's root."""
