"""OpenAI's Responses API: its requests made into chat requests, the answers of those told as items and events."""
