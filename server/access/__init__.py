"""Who may do what, and how much of it: keys, policies, limits, and a log of what was refused or changed."""
