"""Anthropic's Messages API: its requests made into chat requests, the answers of those told in its words."""
