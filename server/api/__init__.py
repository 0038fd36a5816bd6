"""The HTTP routes: requests in, responses out."""
