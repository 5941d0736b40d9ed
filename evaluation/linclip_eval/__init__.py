"""Evaluators. They take ``encode_image`` / ``encode_text`` callables and know no trainer."""
