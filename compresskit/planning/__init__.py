"""From a recipe or a ratio to a plan: a spec for each group, with the totals they lead to."""
