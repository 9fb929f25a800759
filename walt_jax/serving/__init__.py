"""The HTTP API and the web page over a trained run."""
