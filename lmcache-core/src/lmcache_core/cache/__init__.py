"""The public API, and what decides and moves: planner, mover, lookups."""
