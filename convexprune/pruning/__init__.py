"""How a pruning is carried out: what a recipe states, who solves it, and where what is finished is kept."""
