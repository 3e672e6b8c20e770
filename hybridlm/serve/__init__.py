"""A trained run as a server: continuous batching, the HTTP interface of OpenAI, one web page."""
