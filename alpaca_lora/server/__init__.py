"""The service: HTTP in the shapes of OpenAI's API in front of one engine. Knows no training."""
