"""The HTTP server: an OpenAI-like API, and the page."""
