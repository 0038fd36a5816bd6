"""The page at `GET /`: what requests can do, in a browser. Static files over the public API; it may do nothing that
another client could not."""
