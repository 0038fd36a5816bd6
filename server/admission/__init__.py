"""From a request's JSON to the plan that the engine runs: every check of a user's input."""
